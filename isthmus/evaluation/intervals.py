"""How sure a number is: an interval for a mean over images, a spread for anything measured several times.

A share of images (0 or 1 for each) has Wilson's interval: a bootstrap of none or of all says that nothing is unsure.

A distance between sets is never bootstrapped: drawing with replacement repeats images, which narrows the set and pushes
a Frechet distance up. Distances are measured on disjoint chunks of the samples, or on several seeds, and spread there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from isthmus.errors import UserError

# values that are resampled at once
_BLOCK_VALUES = 2**22


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it with the probability asked for.

    Attributes:
        mean: of the values.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing.

    Attributes:
        mean: of the measurements.
        standard_deviation: between them (n - 1 in the denominator); None for a single one.
        count: number of measurements.
    """

    mean: float
    standard_deviation: float | None
    count: int


def bootstrap_interval(values: Float[np.ndarray, " n"], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap (Efron 1979) of a mean over independent images, such as PSNR or an accuracy.

    Raises:
        UserError: no value, or `level` is out of range.

    >>> bootstrap_interval(np.full(5, 2.0))
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    # not at the top of the file: it takes seconds to import
    from scipy import stats

    if not len(values) or not 0 < level < 1:
        raise UserError(f"an interval needs a value per image and a level in (0, 1), got {len(values)} and {level}.")
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    low, high = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=1000,
        batch=max(_BLOCK_VALUES // len(values), 1),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def mean_interval(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"], *, level: float = 0.95) -> Interval:
    """Of a mean over independent images: Wilson's interval where every value is 0 or 1, else a bootstrap.

    Raises:
        UserError: no value, or `level` is out of range.

    >>> mean_interval(np.zeros(4, bool)) == wilson_interval(0, 4)
    True
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) and np.isin(values, (0, 1)).all():
        return wilson_interval(int(values.sum()), len(values), level=level)
    return bootstrap_interval(values, level=level)


def wilson_interval(hits: int, count: int, *, level: float = 0.95) -> Interval:
    """Interval of a share of `count` independent images, of which `hits` are in it.

    It lies within [0, 1], holds more than one value also for none and for all, and is not symmetric about the share.
    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", the score interval.

    Raises:
        UserError: no image, `hits` outside 0..count, or `level` outside (0, 1).

    >>> found = wilson_interval(0, 100)
    >>> found.mean, found.low, round(found.high, 4)
    (0.0, 0.0, 0.037)
    """
    from scipy import stats

    if count < 1 or not 0 <= hits <= count or not 0 < level < 1:
        raise UserError(
            f"the interval of a share needs images, hits among them and a level in (0, 1), got {count}, {hits} and "
            f"{level}."
        )
    low, high = stats.binomtest(hits, count).proportion_ci(level, method="wilson")
    return Interval(hits / count, float(low), float(high))


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over chunks or seeds.

    Raises:
        UserError: no value.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, standard_deviation=1.4142135623730951, count=2)
    >>> spread([4.0])
    Spread(mean=4.0, standard_deviation=None, count=1)
    """
    if not len(values):
        raise UserError("a spread needs at least one measurement, got none.")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))
