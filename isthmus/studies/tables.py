"""Tables of a study: readings, how sure they are, and the written rule behind every verdict.

A table is a function of results: rows of readings, the papers' claims about them, and curves.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from isthmus.evaluation.statistics import Measurements
from isthmus.studies.experiments import Experiment, Values

Verdict = Literal["agrees", "does not agree", "cannot tell"]
Direction = Literal["lower", "higher"]

RULE = (
    "The rule behind every verdict: with several seeds, the two sides are subtracted seed by seed (equal seeds see "
    "the same data in the same order) and the mean difference has a 95 % interval by Student's t. With one seed, the "
    "difference has the 95 % interval that the two measurements have by themselves (bootstrap over images, Wilson's "
    "for shares, standard error of a kernel distance, spread over disjoint chunks or repetitions), which says nothing "
    "of other trainings. A claim agrees where the whole interval lies on its side of 0, does not agree where it lies "
    "on the other, and cannot be told otherwise, or where there is no interval. Times are subtracted round by round "
    "as seeds are. A claim about a FID is judged by two distances: where n < 1,000 the kernel distance counts, since "
    "its estimate has no bias; the other is shown beside it."
)


@dataclass(frozen=True)
class Reading:
    """One measurement of one seed.

    Attributes:
        value: what was measured.
        low: lower end of its own 95 % interval; None where it has none.
        high: upper end.

    >>> Reading.around(2.0, 0.5), Reading(2.0).half_width
    (Reading(value=2.0, low=1.5, high=2.5), None)
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def around(cls, value: float, half_width: float) -> "Reading":
        """A value in the middle of its interval."""
        return cls(value, value - half_width, value + half_width)

    def times(self, factor: float) -> "Reading":
        """The same in another unit."""
        ends = (None if end is None else factor * end for end in (self.low, self.high))
        return Reading(factor * self.value, *ends)

    @property
    def half_width(self) -> float | None:
        """Of an interval around the value that holds its own: the longer side, where it is not in the middle."""
        return None if self.low is None or self.high is None else max(self.high - self.value, self.value - self.low)


Readings = dict[int, Reading]
"""Measurements of one thing by training seed."""


def written_readings(found: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, Readings]:
    """Readings by column of one row, from what the experiment of every seed wrote: a value, then its ends if any.

    >>> written_readings({0: {"PSNR": [20.0, 19.5, 20.5]}, 1: {"PSNR": [21.0]}})["PSNR"][1]
    Reading(value=21.0, low=None, high=None)
    """
    columns: dict[str, Readings] = {}
    for seed, values in found.items():
        for column, written in values.items():
            columns.setdefault(column, {})[seed] = Reading(*written)
    return columns


@dataclass(frozen=True)
class Difference:
    """First minus second.

    Attributes:
        value: mean over seeds.
        half_width: of the 95 % interval; None where it cannot be said.
        num_seeds: seeds that both sides have.
    """

    value: float
    half_width: float | None
    num_seeds: int

    def verdict(self, claimed: Direction) -> Verdict:
        """Whether the first is `claimed` ("lower", "higher") than the second.

        >>> [Difference(value, 1.0, 3).verdict("lower") for value in (-2.0, 0.5, 2.0)]
        ['agrees', 'cannot tell', 'does not agree']
        """
        if self.half_width is None or not math.isfinite(self.value) or abs(self.value) <= self.half_width:
            return "cannot tell"
        return "agrees" if (self.value < 0) == (claimed == "lower") else "does not agree"


def student_95(degrees: int) -> float:
    """97.5 % point of Student's t.

    >>> round(student_95(2), 3), round(student_95(20), 3)
    (4.303, 2.086)
    """
    # not at the top of the file: it takes seconds to import
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees))


def half_width_of_mean(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean; None for a single value."""
    found = Measurements.of(values)
    if found.deviation is None:
        return None
    return student_95(found.count - 1) * found.deviation / math.sqrt(found.count)


def difference(first: Readings, second: Readings) -> Difference | None:
    """First minus second over the seeds that both have; None where they share none.

    >>> difference({0: Reading(1.0), 1: Reading(2.0)}, {0: Reading(3.0), 1: Reading(4.0)})
    Difference(value=-2.0, half_width=0.0, num_seeds=2)
    >>> difference({0: Reading.around(1.0, 3.0)}, {0: Reading.around(2.0, 4.0)})
    Difference(value=-1.0, half_width=5.0, num_seeds=1)
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    gaps = [first[seed].value - second[seed].value for seed in seeds]
    mean = Measurements.of(gaps).mean
    if len(seeds) > 1:
        return Difference(mean, half_width_of_mean(gaps), len(seeds))
    ours, theirs = first[seeds[0]].half_width, second[seeds[0]].half_width
    return Difference(mean, None if ours is None or theirs is None else math.hypot(ours, theirs), 1)


Setting = TypeVar("Setting", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says about two rows of a table.

    Attributes:
        says: the claim, with the paper's figures.
        source: where it stands.
        first: row that is claimed to be lower or higher ...
        second: ... than this one.
        column: in which column.
        direction: which of both.
    """

    says: str
    source: str
    first: str
    second: str
    column: str
    direction: Direction


@dataclass(frozen=True)
class Finding:
    """A claim beside what was measured; `difference` is None where a row is missing."""

    claim: Claim
    difference: Difference | None
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel.

    Attributes:
        name: in the legend.
        x, y: points.
        half_widths: of the bars at the points; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half_widths: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over one axis; `level` is a dashed horizontal line with its name."""

    title: str
    along: str
    lines: tuple[Line, ...]
    level: tuple[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        name: of what was measured.
        facts: text cells by column, such as the guidance.
        cells: readings by column.
    """

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, Readings] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """A finished table.

    Attributes:
        about: what was compared, and what was held equal.
        first_column: head of the names of the rows.
        rows: in order.
        claims: of the papers, about these rows.
        panels: curves.
        timed: columns whose readings are rounds of timing, not seeds.
        notes: what else to know, a paragraph each; also what no paper has a figure for.
    """

    about: str
    first_column: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    panels: tuple[Panel, ...] = ()
    timed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def columns(self) -> tuple[list[str], list[str]]:
        """Names of the text columns and of the columns of readings, in the order in which rows bring them up."""
        facts, cells = {}, {}
        for row in self.rows:
            facts |= dict.fromkeys(row.facts)
            cells |= dict.fromkeys(row.cells)
        return list(facts), list(cells)

    def text(self) -> tuple[list[str], list[list[str]]]:
        """Head and cells as text."""
        facts, cells = self.columns()
        head = [self.first_column, *facts, *cells]
        rows = [
            [
                row.name,
                *(row.facts.get(name, "") for name in facts),
                *(cell_text(row.cells.get(name), self.repetitions(name)) for name in cells),
            ]
            for row in self.rows
        ]
        return head, rows

    def repetitions(self, column: str) -> str:
        """What the readings of a column repeat."""
        return "rounds" if column in self.timed else "seeds"

    def findings(self) -> Iterator[Finding]:
        """Every claim beside the measured difference."""
        by_name = {row.name: row for row in self.rows}
        for claim in self.claims:
            sides = [by_name[name].cells.get(claim.column) if name in by_name else None for name in claim_rows(claim)]
            found = difference(sides[0], sides[1]) if sides[0] is not None and sides[1] is not None else None
            yield Finding(claim, found, "cannot tell" if found is None else found.verdict(claim.direction))


@dataclass(frozen=True, kw_only=True)
class TableSpec(Generic[Setting]):
    """A table that a study may fill.

    Attributes:
        name: on the command line.
        title: in the report.
        experiments: those it needs, in an order that can be run; other tables may share them.
        make: the table, from the results of all experiments that were run, by name.
    """

    name: str
    title: str
    experiments: Callable[[Setting], Sequence[Experiment]]
    make: Callable[[Setting, Mapping[str, Values]], StudyTable]


def claim_rows(claim: Claim) -> tuple[str, str]:
    """The two rows a claim is about."""
    return claim.first, claim.second


def line_of(name: str, points: Mapping[int, Readings] | Mapping[float, Readings]) -> Line:
    """Means over seeds with their 95 % intervals; with one seed, the value with its own."""
    columns = {x: list(readings.values()) for x, readings in points.items()}
    widths = [
        half_width_of_mean([one.value for one in column]) if len(column) > 1 else column[0].half_width
        for column in columns.values()
    ]
    known = [width for width in widths if width is not None]
    return Line(
        name=name,
        x=list(columns),
        y=[Measurements.of([one.value for one in column]).mean for column in columns.values()],
        half_widths=known if len(known) == len(widths) else (),
    )


def cell_text(readings: Readings | None, repetitions: str = "seeds") -> str:
    """Mean and standard deviation over seeds; with one seed, the value and its own 95 % interval.

    >>> from isthmus.studies.tables import Reading
    >>> cell_text({0: Reading(1.0), 1: Reading(3.0)})
    '2 ± 1.414 (2 seeds)'
    >>> cell_text({0: Reading.around(2.0, 0.25)}), cell_text({0: Reading(2.0)})
    ('2 [1.75, 2.25]', '2')
    """
    if not readings:
        return ""
    found = Measurements.of([reading.value for reading in readings.values()])
    if found.deviation is not None:
        return f"{number(found.mean)} ± {number(found.deviation)} ({found.count} {repetitions})"
    (reading,) = readings.values()
    if reading.low is None or reading.high is None or reading.low == reading.high:
        return number(found.mean)
    return f"{number(found.mean)} [{number(reading.low)}, {number(reading.high)}]"


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"
