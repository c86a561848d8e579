"""What was measured, how sure it is, and when two numbers differ: the written rule behind every verdict of a study."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from isthmus.evaluation.intervals import spread

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
    found = spread(values)
    if found.standard_deviation is None:
        return None
    return student_95(found.count - 1) * found.standard_deviation / math.sqrt(found.count)


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
    mean = spread(gaps).mean
    if len(seeds) > 1:
        return Difference(mean, half_width_of_mean(gaps), len(seeds))
    ours, theirs = first[seeds[0]].half_width, second[seeds[0]].half_width
    return Difference(mean, None if ours is None or theirs is None else math.hypot(ours, theirs), 1)
