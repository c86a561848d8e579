"""Tables of a study: readings, how sure they are, and the written rule behind every verdict."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from isthmus.evaluation.statistics import spread
from isthmus.studies.experiments import Experiment, Values
from isthmus.studies.options import StudySetting

Verdict = Literal["agrees", "does not agree", "cannot tell"]
Direction = Literal["lower", "higher"]

KERNEL, FRECHET = "KD-lite0-192", "FD-lite0-192"
"""The kernel distance leads where n < 1,000; the Frechet distance is what the papers' FID is on other features."""

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
    """One measurement of one seed, with the ends of its own 95 % interval where it has one.

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


def by_column(found: Mapping[int, Mapping[str, Any]], read: Callable[[Any], Reading]) -> dict[str, Readings]:
    """Readings of one row, from what the experiment of every seed wrote for every column.

    >>> by_column({0: {"PSNR": [20.0, 19.5, 20.5]}, 1: {"PSNR": [21.0]}}, lambda written: Reading(*written))["PSNR"][1]
    Reading(value=21.0, low=None, high=None)
    """
    columns: dict[str, Readings] = {}
    for seed, values in found.items():
        for column, written in values.items():
            columns.setdefault(column, {})[seed] = read(written)
    return columns


@dataclass(frozen=True)
class Difference:
    """First minus second, mean over the seeds that both sides have.

    Attributes:
        half_width: of the 95 % interval; None where it cannot be said.
    """

    value: float
    half_width: float | None
    num_seeds: int

    def verdict(self, claimed: Direction) -> Verdict:
        """Whether the first is `claimed` than the second.

        >>> [Difference(value, 1.0, 3).verdict("lower") for value in (-2.0, 0.5, 2.0)]
        ['agrees', 'cannot tell', 'does not agree']
        """
        if self.half_width is None or not math.isfinite(self.value) or abs(self.value) <= self.half_width:
            return "cannot tell"
        return "agrees" if (self.value < 0) == (claimed == "lower") else "does not agree"


def student_half_width(deviation: float, count: int) -> float:
    """Half of the 95 % interval of a mean of `count` values with this standard deviation, by Student's t.

    >>> round(student_half_width(1.0, 4), 3)  # 3.182 / 2
    1.591
    """
    # not at the top of the file: it takes seconds to import
    from scipy import stats

    return float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)


def half_width_of_mean(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean; None for a single value."""
    found = spread(values)
    return None if found.standard_deviation is None else student_half_width(found.standard_deviation, found.count)


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
    if len(seeds) > 1:
        return Difference(spread(gaps).mean, half_width_of_mean(gaps), len(seeds))
    ours, theirs = first[seeds[0]].half_width, second[seeds[0]].half_width
    return Difference(gaps[0], None if ours is None or theirs is None else math.hypot(ours, theirs), 1)


@dataclass(frozen=True)
class Claim:
    """What a paper says about two rows of a table: the first is lower or higher than the second in this column.

    Attributes:
        says: the claim, with the paper's figures.
        source: where it stands.
        column: `FRECHET` for a FID, which is judged by the kernel distance too.
    """

    says: str
    source: str
    first: str
    second: str
    column: str
    direction: Direction = "lower"


@dataclass(frozen=True)
class Finding:
    """A claim beside what was measured; `difference` is None where a row is missing."""

    claim: Claim
    difference: Difference | None

    @property
    def verdict(self) -> Verdict:
        """Whether the measured difference agrees with the claim."""
        return "cannot tell" if self.difference is None else self.difference.verdict(self.claim.direction)


@dataclass(frozen=True)
class Line:
    """One line of a panel; `half_widths` are of the bars at its points, empty for none."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half_widths: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Lines over one axis; `level` is a dashed horizontal line with its name."""

    title: str
    along: str
    lines: tuple[Line, ...]
    level: tuple[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: text cells, such as the guidance, and readings, both by column."""

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, Readings] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """A finished table.

    Attributes:
        about: what was compared, and what was held equal.
        first_column: head of the names of the rows.
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

    def text(self) -> tuple[list[str], list[list[str]]]:
        """Head and cells as text; columns stand in the order in which rows bring them up."""
        facts = dict.fromkeys(name for row in self.rows for name in row.facts)
        cells = dict.fromkeys(name for row in self.rows for name in row.cells)
        rows = [
            [
                row.name,
                *(row.facts.get(name, "") for name in facts),
                *(cell_text(row.cells.get(name), self.repetitions(name)) for name in cells),
            ]
            for row in self.rows
        ]
        return [self.first_column, *facts, *cells], rows

    def repetitions(self, column: str) -> str:
        """What the readings of a column repeat."""
        return "rounds" if column in self.timed else "seeds"

    def findings(self) -> Iterator[Finding]:
        """Every claim beside the measured difference; one about a FID by both distances."""
        cells = {row.name: row.cells for row in self.rows}
        for claim in self.claims:
            for column in (KERNEL, FRECHET) if claim.column == FRECHET else (claim.column,):
                first, second = (cells.get(name, {}).get(column, {}) for name in (claim.first, claim.second))
                yield Finding(replace(claim, column=column), difference(first, second))


Setting = TypeVar("Setting", bound=StudySetting)


@dataclass(frozen=True)
class Found(Generic[Setting]):
    """What the experiments of a study with this setting found, by the name of the experiment."""

    setting: Setting
    results: Mapping[str, Values]

    def by_seed(self, name: str, *path: str | int) -> dict[int, Any]:
        """What the experiment of this name found for each training seed, all of it or what lies at `path`."""
        found: Any = {seed: self.results[f"{name}-seed{seed}"] for seed in self.setting.seeds}
        for step in path:
            found = {seed: values[step] for seed, values in found.items()}
        return found

    def all_of(self, *names: str) -> list[Values]:
        """What these experiments found, for all training seeds."""
        return [values for name in names for values in self.by_seed(name).values()]


@dataclass(frozen=True)
class TableSpec(Generic[Setting]):
    """A table that a study may fill.

    Attributes:
        name: on the command line.
        title: in the report.
        experiments: those it needs, in an order that can be run; other tables may share them.
        make: the table, from what they found.
    """

    name: str
    title: str
    experiments: Callable[[Setting], Iterable[Experiment]]
    make: Callable[[Found[Setting]], StudyTable]


def study_table(
    title: str, experiments: Callable[[Any], Iterable[Experiment]]
) -> Callable[[Callable[[Found[Setting]], StudyTable]], TableSpec[Setting]]:
    """A decorator: the function makes the table of its own name, from what `experiments` found."""
    return lambda make: TableSpec(make.__name__, title, experiments, make)


def line_of(name: str, points: Mapping[int, Readings] | Mapping[float, Readings]) -> Line:
    """Means over seeds with their 95 % intervals; with one seed, the value with its own."""
    columns = {x: list(readings.values()) for x, readings in points.items()}
    widths = [
        half_width_of_mean([one.value for one in column]) if len(column) > 1 else column[0].half_width
        for column in columns.values()
    ]
    means = [spread([one.value for one in column]).mean for column in columns.values()]
    known = [width for width in widths if width is not None]
    return Line(name, list(columns), means, known if len(known) == len(widths) else ())


def line_of_lists(name: str, found: Mapping[int, Values], values: str, x: Sequence[float]) -> Line:
    """A line through the lists that the experiments of all seeds have under `values`, an entry for each `x`."""
    places = enumerate(x)
    return line_of(name, {at: {seed: Reading(one[values][i]) for seed, one in found.items()} for i, at in places})


def panels_of(
    columns: Sequence[str],
    along: str,
    lines: Mapping[str, Mapping[Any, Row]],
    floor: Row,
    *,
    words: str = "",
) -> tuple[Panel, ...]:
    """A panel for each of `columns` that was measured, with `words` in its title: rows at x, by the name of their line.

    What real images score, in the row `floor`, is a level.
    """
    panels = []
    for column in columns:
        measured = {name: rows for name, rows in lines.items() if all(column in row.cells for row in rows.values())}
        drawn = [line_of(name, {x: row.cells[column] for x, row in rows.items()}) for name, rows in measured.items()]
        real = next(iter(floor.cells.get(column, {}).values()), None)
        if drawn:
            panels.append(Panel(column + words, along, tuple(drawn), real and ("real images", real.value)))
    return tuple(panels)


def cell_text(readings: Readings | None, repetitions: str = "seeds") -> str:
    """Mean and standard deviation over seeds; with one seed, the value and its own 95 % interval.

    >>> cell_text({0: Reading(1.0), 1: Reading(3.0)})
    '2 ± 1.414 (2 seeds)'
    >>> cell_text({0: Reading.around(2.0, 0.25)}), cell_text({0: Reading(2.0)})
    ('2 [1.75, 2.25]', '2')
    """
    if not readings:
        return ""
    found = spread([reading.value for reading in readings.values()])
    if found.standard_deviation is not None:
        return f"{found.mean:.4g} ± {found.standard_deviation:.4g} ({found.count} {repetitions})"
    (reading,) = readings.values()
    if reading.low is None or reading.high is None or reading.low == reading.high:
        return f"{found.mean:.4g}"
    return f"{found.mean:.4g} [{reading.low:.4g}, {reading.high:.4g}]"
