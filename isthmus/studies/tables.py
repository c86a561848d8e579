"""Tables of a study: rows of readings, the papers' claims about them, and curves. A table is a function of results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from isthmus.evaluation.intervals import spread
from isthmus.studies.experiments import Experiment, Values
from isthmus.studies.readings import (
    Difference,
    Direction,
    Readings,
    Verdict,
    difference,
    half_width_of_mean,
)

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
        y=[spread([one.value for one in column]).mean for column in columns.values()],
        half_widths=known if len(known) == len(widths) else (),
    )


def cell_text(readings: Readings | None, repetitions: str = "seeds") -> str:
    """Mean and standard deviation over seeds; with one seed, the value and its own 95 % interval.

    >>> from isthmus.studies.readings import Reading
    >>> cell_text({0: Reading(1.0), 1: Reading(3.0)})
    '2 ± 1.414 (2 seeds)'
    >>> cell_text({0: Reading.around(2.0, 0.25)}), cell_text({0: Reading(2.0)})
    ('2 [1.75, 2.25]', '2')
    """
    if not readings:
        return ""
    found = spread([reading.value for reading in readings.values()])
    if found.standard_deviation is not None:
        return f"{number(found.mean)} ± {number(found.standard_deviation)} ({found.count} {repetitions})"
    (reading,) = readings.values()
    if reading.low is None or reading.high is None or reading.low == reading.high:
        return number(found.mean)
    return f"{number(found.mean)} [{number(reading.low)}, {number(reading.high)}]"


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"
