"""Tables of a study: readings, how sure they are, and the written rule behind every verdict."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from isthmus.errors import UserError
from isthmus.evaluation.statistics import Measurements
from isthmus.studies.experiments import Experiment, Values
from isthmus.studies.options import StudySetting

NORMAL_95 = 1.96

Verdict = Literal["agrees", "does not agree", "cannot tell"]
Direction = Literal["lower", "higher"]

CLASS = "class accuracy (nearest mean)"
KERNEL, FRECHET = "KD-lite0-192", "FD-lite0-192"
"""The kernel distance leads where n < 1,000; the Frechet distance is what the papers' FID is on other features."""

SAMPLE_SCORES = (KERNEL, FRECHET, CLASS, "memorised share", "nearer than held-out")
"""Scores of samples that the tables show; the evaluations' own reports have the others."""

RULE = (
    "The rule behind every verdict: with several seeds, the two sides are subtracted seed by seed (equal seeds see "
    "the same data in the same order) and the mean difference has a 95 % interval by Student's t. With one seed, the "
    "two sides are subtracted in 20 groups of images where both were measured on the same ones, or drew images of the "
    "same numbers and classes; elsewhere the difference has the interval that the two measurements have by themselves "
    "(bootstrap over images, Wilson's for shares, standard error, spread over disjoint chunks or repetitions). Either "
    "says nothing of other trainings. A claim agrees where the whole interval lies on its side of 0, does not agree "
    "where it lies on the other, and cannot be told otherwise, or where there is no interval. What could be seen is "
    "half of the interval: a difference below it would not have been told from none, and what cannot be told is "
    "smaller than the end of its interval that lies farther from 0. Times are subtracted round by round as seeds are. "
    "A claim about a FID is judged by two distances: where n < 1,000 the kernel distance counts, since its estimate "
    "has no bias; the other is shown beside it."
)


@dataclass(frozen=True)
class Reading:
    """One measurement of one seed, with the ends of its own 95 % interval where it has one.

    `parts` are what groups of its images say (`isthmus.evaluation.jackknife`), where they are known.

    >>> Reading.around(2.0, 0.5), Reading(2.0).half_width
    (Reading(value=2.0, low=1.5, high=2.5, parts=()), None)
    """

    value: float
    low: float | None = None
    high: float | None = None
    parts: tuple[float, ...] = ()

    @classmethod
    def written(cls, found: Sequence[Any]) -> "Reading":
        """From JSON: a value, the ends of its interval and the parts, as far as they are known."""
        *ends, parts = found if len(found) == 4 else (*found, ())
        return cls(*ends, parts=tuple(parts))

    @classmethod
    def around(cls, value: float, half_width: float) -> "Reading":
        """A value in the middle of its interval."""
        return cls(value, value - half_width, value + half_width)

    def times(self, factor: float) -> "Reading":
        """The same in another unit."""
        ends = (None if end is None else factor * end for end in (self.low, self.high))
        return Reading(factor * self.value, *ends, parts=tuple(factor * part for part in self.parts))

    @property
    def half_width(self) -> float | None:
        """Of an interval around the value that holds its own: the longer side, where it is not in the middle."""
        return None if self.low is None or self.high is None else max(self.high - self.value, self.value - self.low)


Readings = dict[int, Reading]
"""Measurements of one thing by training seed."""


def by_column(found: Mapping[int, Mapping[str, Any]], read: Callable[[Any], Reading]) -> dict[str, Readings]:
    """Readings of one row, from what the experiment of every seed wrote for every column.

    >>> by_column({0: {"PSNR": [20.0, 19.5, 20.5]}, 1: {"PSNR": [21.0]}}, Reading.written)["PSNR"][1]
    Reading(value=21.0, low=None, high=None, parts=())
    """
    columns: dict[str, Readings] = {}
    for seed, values in found.items():
        for column, written in values.items():
            columns.setdefault(column, {})[seed] = read(written)
    return columns


def score_reading(score: Mapping[str, Any]) -> Reading:
    """A score with its 95 % interval: its own ends, else 1.96 standard errors, else that of a mean over chunks.

    >>> score_reading({"value": 3.0, "low": None, "high": None, "error": 0.5, "deviation": None, "measurements": 1})
    Reading(value=3.0, low=2.02, high=3.98, parts=())
    """
    value = math.nan if score["value"] is None else float(score["value"])
    low, high, error, deviation = (score[name] for name in ("low", "high", "error", "deviation"))
    if low is None or high is None:
        half_width = None
        if error is not None:
            half_width = NORMAL_95 * error
        elif deviation is not None and score["measurements"] > 1:
            half_width = student_half_width(deviation, score["measurements"])
        low, high = (None, None) if half_width is None else (value - half_width, value + half_width)
    return Reading(value, low, high, tuple(score.get("parts", ())))


@dataclass(frozen=True)
class Difference:
    """First minus second, mean over the seeds that both have; `half_width` of its 95 % interval, where there is one.

    `second` is the mean of the second side, so that differences can be read as shares of it.
    """

    value: float
    half_width: float | None
    num_seeds: int
    second: float = math.nan

    @property
    def at_most(self) -> float | None:
        """How far apart the sides are at most, by the interval.

        >>> Difference(-1.0, 2.0, 3).at_most
        3.0
        """
        return None if self.half_width is None else abs(self.value) + self.half_width

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
    found = Measurements.of(values)
    return None if found.deviation is None else student_half_width(found.deviation, found.count)


def mean_and_half_width(readings: Readings) -> tuple[float, float | None]:
    """Over seeds; with one seed, the value with the half width of its own interval."""
    values = [reading.value for reading in readings.values()]
    own = next(iter(readings.values())).half_width
    return Measurements.of(values).mean, half_width_of_mean(values) if len(values) > 1 else own


def difference(first: Readings, second: Readings) -> Difference:
    """First minus second over the seeds that both have.

    With one seed, group by group where both have parts.

    >>> difference({0: Reading(1.0), 1: Reading(2.0)}, {0: Reading(3.0), 1: Reading(4.0)})
    Difference(value=-2.0, half_width=0.0, num_seeds=2, second=3.5)
    >>> difference({0: Reading.around(1.0, 3.0)}, {0: Reading.around(2.0, 4.0)})
    Difference(value=-1.0, half_width=5.0, num_seeds=1, second=2.0)
    >>> difference({0: Reading(1.0, parts=(0.0, 2.0))}, {0: Reading(3.0, parts=(2.0, 4.0))}).half_width
    0.0
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return Difference(math.nan, None, 0)
    gaps = [first[seed].value - second[seed].value for seed in seeds]
    beside = Measurements.of([second[seed].value for seed in seeds]).mean
    if len(seeds) > 1:
        return Difference(Measurements.of(gaps).mean, half_width_of_mean(gaps), len(seeds), beside)
    one, other = first[seeds[0]], second[seeds[0]]
    if one.parts and len(one.parts) == len(other.parts):
        in_groups = [ours - theirs for ours, theirs in zip(one.parts, other.parts, strict=True)]
        return Difference(gaps[0], half_width_of_mean(in_groups), 1, beside)
    ours, theirs = one.half_width, other.half_width
    return Difference(gaps[0], None if ours is None or theirs is None else math.hypot(ours, theirs), 1, beside)


@dataclass(frozen=True)
class Claim:
    """What a paper says, with its figures: the first row is lower, or higher, than the second in this column.

    `FRECHET` stands for a FID, which is judged by the kernel distance too.
    """

    says: str
    source: str
    first: str
    second: str
    column: str
    direction: Direction = "lower"


@dataclass(frozen=True)
class Panel:
    """Lines over one axis, readings at every x by name; `level` is a dashed horizontal line with its name."""

    title: str
    along: str
    lines: Mapping[str, Mapping[Any, Readings]]
    level: tuple[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: text cells, such as the guidance, and readings, both by column."""

    name: str
    facts: Mapping[str, str] = field(default_factory=dict)
    cells: Mapping[str, Readings] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudyTable:
    """A finished table `about` what was compared and held equal, with paragraphs of `notes` below it.

    `first_column` heads the names of the rows; the readings of `timed` columns are rounds of timing, not seeds.
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

    def findings(self) -> Iterator[tuple[Claim, Difference]]:
        """Every claim beside the measured difference; one about a FID by both distances."""
        cells = {row.name: row.cells for row in self.rows}
        for claim in self.claims:
            for column in (KERNEL, FRECHET) if claim.column == FRECHET else (claim.column,):
                first, second = (cells.get(name, {}).get(column, {}) for name in (claim.first, claim.second))
                yield replace(claim, column=column), difference(first, second)


Setting = TypeVar("Setting", bound=StudySetting)


@dataclass(frozen=True)
class Found(Generic[Setting]):
    """What the experiments of a study with this setting found, by name, as tables read it.

    Methods take names of experiments without their seeds.
    """

    setting: Setting
    results: Mapping[str, Values]

    def by_seed(self, experiment: str, *path: str | int) -> dict[int, Any]:
        """What was found with each training seed, all of it or what lies at `path`."""
        found: Any = {seed: self.results[f"{experiment}-seed{seed}"] for seed in self.setting.seeds}
        for step in path:
            found = {seed: values[step] for seed, values in found.items()}
        return found

    def first(self, experiment: str, *path: str | int) -> Any:
        """The same of the first seed."""
        return self.by_seed(experiment, *path)[self.setting.seeds[0]]

    def points(self, experiment: str, values: str, x: Iterable[float]) -> dict[float, Readings]:
        """Readings at every `x` of the list that was found under `values`."""
        by_seed = self.by_seed(experiment, values)
        return {at: {seed: Reading(found[i]) for seed, found in by_seed.items()} for i, at in enumerate(x)}

    def held_out_score(self, experiment: str, name: str) -> Readings:
        """A score of the evaluation of held-out images; empty where it was not measured."""
        return by_column(self.by_seed(experiment, "held_out"), score_reading).get(name, {})

    def held_out_row(self, name: str, experiment: str, *path: str | int, column: str = "", once: bool = False) -> "Row":
        """What lies at `path` of held-out images: by column, or in one, a value and the ends of its interval if any.

        `once`: no training decides it, so the first seed speaks for all.
        """
        by_seed = {seed: {column: at} if column else at for seed, at in self.by_seed(experiment, *path).items()}
        if once:
            by_seed = {0: next(iter(by_seed.values()))}
        facts = {"images": str(self.first(experiment, "images")), "seeds": self.setting.seed_words}
        return Row(name=name, facts=facts, cells=by_column(by_seed, Reading.written))

    def sample_row(
        self,
        name: str,
        experiment: str,
        *path: str,
        guidance: str | None = None,
        facts: Mapping[str, str] | None = None,
        cells: Mapping[str, Readings] | None = None,
    ) -> "Row":
        """Scores of samples at `path`, by default an evaluation's at `guidance`, by default the prior's own.

        `facts` stand before what is beside every number of samples, `cells` behind the scores.
        """
        protocol, guidance = self.first(experiment, "protocol"), guidance or self.setting.own_guidance
        measured = by_column(self.by_seed(experiment, *(path or ("by_guidance", guidance))), score_reading)
        beside = {"guidance": guidance, "N": str(protocol["num_samples"]), "n": str(protocol["chunk_images"])}
        return Row(
            name=name,
            facts={**(facts or {}), **beside, "seeds": self.setting.seed_words},
            cells={**{one: measured[one] for one in SAMPLE_SCORES if one in measured}, **(cells or {})},
        )

    def real_rows(self, experiment: str, *path: str) -> "tuple[Row, Row]":
        """Floor and ceiling beside scores at a path as for `sample_row`: what real, and ruined, images score."""
        scores = self.first(experiment, *(path or ("by_guidance", self.setting.own_guidance)))
        measured = [name for name in SAMPLE_SCORES if name in scores]

        def row(side: str) -> Row:
            values = {name: scores[name][side] for name in measured if scores[name][side] is not None}
            return Row(name=side, cells={name: {0: Reading(float(value))} for name, value in values.items()})

        return row("floor"), row("ceiling")

    def protocol_words(self, *experiments: str) -> str:
        """How the samples of these experiments were measured; `UserError` where they were in different ways."""
        first, *others = (one for name in experiments for one in self.by_seed(name, "protocol").values())
        for other in others:
            differences = [name.replace("_", " ") for name in first if first[name] != other[name]]
            if differences:
                raise UserError(
                    "two experiments of one table were measured in different ways, so their scores do not compare: "
                    f"they differ in {', '.join(differences)}. Remove the folder of the older one, or choose another "
                    "--out."
                )
        return (
            f"N samples per row and seed ({first['balance']}), n images per distance against n of "
            f"{first['reference']}; features {first['features']} ({first['features_sha256'][:12]}), "
            f"{first['image_size']} px. Floor: real images disjoint from the reference (of class accuracy: held-out "
            "images); ceiling: real images blurred to almost their mean colour (of class accuracy: chance; of "
            "memorised shares and of what is nearer than held-out images: training images as training sees them, which "
            "is how much of true copies these two can see)."
        )

    def warnings(self, *experiments: str) -> tuple[str, ...]:
        """What the guards said of these samples, each sentence once."""
        said = (one for name in experiments for found in self.by_seed(name, "warnings").values() for one in found)
        return tuple(f"Warning: {one}" for one in dict.fromkeys(said))


@dataclass(frozen=True)
class TableSpec(Generic[Setting]):
    """A table that a study may fill, by its name on the command line.

    `experiments` are those it needs, in an order that can be run; other tables may share them.
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


def panels_of(
    columns: Sequence[str], along: str, lines: Mapping[str, Mapping[Any, Row]], floor: Row, words: str = ""
) -> tuple[Panel, ...]:
    """A panel for each of `columns` that was measured: rows at x, by line; what real images score (`floor`) is a level.

    `words` end its title.
    """
    panels = []
    for column in columns:
        if any(column not in row.cells for rows in lines.values() for row in rows.values()):
            continue
        drawn = {name: {x: row.cells[column] for x, row in rows.items()} for name, rows in lines.items()}
        real = next(iter(floor.cells.get(column, {}).values()), None)
        panels.append(Panel(column + words, along, drawn, real and ("real images", real.value)))
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
    found = Measurements.of([reading.value for reading in readings.values()])
    if found.deviation is not None:
        return f"{found.mean:.4g} ± {found.deviation:.4g} ({found.count} {repetitions})"
    (reading,) = readings.values()
    if reading.low is None or reading.high is None or reading.low == reading.high:
        return f"{found.mean:.4g}"
    return f"{found.mean:.4g} [{reading.low:.4g}, {reading.high:.4g}]"
