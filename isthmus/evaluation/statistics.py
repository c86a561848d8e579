"""Distances between sets of features, and how sure a number is.

Frechet distance: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6; Dowson and Landau
1982. Its bias depends on the number of images, so it is measured on disjoint chunks of one fixed size. Kernel distance
(KID): Binkowski et al. 2018, "Demystifying MMD GANs", section 3 and equation 4 (unbiased, so it may be negative).

A share of images (0 or 1 for each) has Wilson's interval: a bootstrap of none or of all says that nothing is unsure. A
distance between sets is never bootstrapped: drawing with replacement repeats images, which narrows the set and pushes a
Frechet distance up. Groups of images are left out in turn instead (jackknife.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError

_BLOCK_VALUES = 2**22  # resampled at once
_BLOCK_ROWS = 4096  # centred at once: of 2,048 doubles each they are 64 MiB


@dataclass(frozen=True)
class Interval:
    """A mean over independent images and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurements:
    """Several measurements of one thing; `deviation` (n - 1 in the denominator) is None for a single one."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Measurements":
        """Over chunks or seeds, of which there is at least one.

        >>> Measurements.of([1.0, 3.0])
        Measurements(mean=2.0, deviation=1.4142135623730951, count=2)
        >>> Measurements.of([4.0])
        Measurements(mean=4.0, deviation=None, count=1)
        """
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), deviation, len(values))


def bootstrap_interval(values: Float[np.ndarray, " n"]) -> Interval:
    """Percentile bootstrap (Efron 1979) of a mean, such as PSNR. Raises UserError where there is no value.

    >>> bootstrap_interval(np.full(5, 2.0))
    Interval(mean=2.0, low=2.0, high=2.0)
    """
    # not at the top of the file: it takes a second to import
    from scipy import stats

    if not len(values):
        raise UserError("an interval needs a value per image, got none.")
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    low, high = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=1000,
        batch=max(_BLOCK_VALUES // len(values), 1),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def mean_interval(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> Interval:
    """Wilson's interval where every value is 0 or 1, else a bootstrap. Raises UserError where there is no value.

    >>> mean_interval(np.zeros(4, bool)) == wilson_interval(0, 4)
    True
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) and np.isin(values, (0, 1)).all():
        return wilson_interval(int(values.sum()), len(values))
    return bootstrap_interval(values)


def wilson_interval(hits: int, count: int) -> Interval:
    """Interval of a share of `count` images, at least one, of which `hits` are in it.

    It lies within [0, 1], holds more than one value also for none and for all, and is not symmetric about the share.
    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", the score interval.

    >>> found = wilson_interval(0, 100)
    >>> found.mean, found.low, round(found.high, 4)
    (0.0, 0.0, 0.037)
    """
    from scipy import stats

    low, high = stats.binomtest(hits, count).proportion_ci(method="wilson")
    return Interval(hits / count, float(low), float(high))


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of a set of features, the covariance as a factor A with A A^T = covariance.

    The factor is what a Frechet distance needs. It has as many columns as the covariance has rank: few images cost
    little, and directions without variance add no rounding error.
    """

    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "d rank"]

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """A A^T."""
        return self.factor @ self.factor.T

    @classmethod
    def from_covariance(
        cls, mean: Float[np.ndarray, " d"] | Float[Tensor, " d"], covariance: Float[np.ndarray, "d d"] | Tensor
    ) -> "Gaussian":
        """Of a known mean and covariance, such as `mu` and `sigma` of an ADM file.

        Raises UserError where the covariance is no symmetric matrix without negative eigenvalues that fits the mean.
        """
        mean, covariance = as_double(mean), as_double(covariance)
        wanted = (len(mean), len(mean))
        if covariance.shape != wanted:
            raise UserError(f"the covariance must be {wanted}, as the mean is, got {tuple(covariance.shape)}.")
        if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise UserError("mean and covariance must be finite, got NaN or infinity. Make the statistics again.")
        size = float(covariance.abs().max()) if covariance.numel() else 0.0
        if float((covariance - covariance.T).abs().max()) > 1e-4 * size:
            raise UserError("a covariance must be symmetric, got one that is not. Make the statistics again.")
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        largest = float(values[-1].clamp_min(0))
        # statistics kept in float32 have eigenvalues a little below 0
        if float(values[0]) < -1e-4 * max(largest, size):
            raise UserError(
                f"a covariance must have no negative eigenvalue, got {float(values[0]):g}. Make the statistics again."
            )
        kept = values > largest * len(values) * torch.finfo(torch.float64).eps
        return cls(mean, vectors[:, kept] * values[kept].sqrt())

    @classmethod
    def of(cls, rows: Float[np.ndarray, "n d"]) -> "Gaussian":
        """Fitted to rows, with the unbiased covariance. Raises UserError for fewer than two, or values not finite."""
        count, width = rows.shape
        if 2 <= count <= width and np.isfinite(rows).all():
            # the centred rows are a factor already: no eigenvalue problem of a rank-deficient d x d matrix
            values = as_double(rows)
            mean = values.mean(dim=0)
            return cls(mean, ((values - mean) / (count - 1) ** 0.5).T.contiguous())
        mean, covariance, _ = mean_and_covariance([rows])
        return cls.from_covariance(mean, covariance)


def mean_and_covariance(parts: Iterable[Float[np.ndarray, "_ d"]]) -> tuple[Tensor, Tensor, int]:
    """Mean, unbiased covariance and number of features that arrive in parts, in the memory of one d x d matrix.

    Raises UserError for fewer than two rows, or values that are not finite.

    >>> mean, covariance, count = mean_and_covariance([np.array([[1.0], [2.0]]), np.array([[6.0]])])
    >>> mean.item(), covariance.item(), count
    (3.0, 7.0, 3)
    """
    count, mean, scatter = 0, torch.zeros(1), torch.zeros(1)
    for block in (part[start : start + _BLOCK_ROWS] for part in parts for start in range(0, len(part), _BLOCK_ROWS)):
        values = as_double(block)
        if not bool(torch.isfinite(values).all()):
            raise UserError("features must be finite, got NaN or infinity. Look at the images they were made of.")
        if not count:
            width = values.shape[1]
            mean, scatter = (torch.zeros(shape, dtype=torch.float64) for shape in (width, (width, width)))
        total, own_mean = count + len(values), values.mean(dim=0)
        centred, step = values - own_mean, own_mean - mean
        # Chan, Golub and LeVeque 1979: the parts' own scatter, plus that of their means
        scatter += centred.T @ centred
        scatter.addr_(step, step, alpha=count * len(values) / total)
        mean = mean + step * (len(values) / total)
        count = total
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, got {count}. Measure more images.")
    return mean, scatter / (count - 1), count


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), the squared Wasserstein-2 distance of two Gaussians.

    With S1 = A A^T and S2 = B B^T the last trace is the sum of the singular values of A^T B, which needs no root of a
    matrix and loses no digits where the covariances are of low rank.

    >>> one, two = (Gaussian.from_covariance(np.zeros(2), np.eye(2) * v) for v in (1.0, 4.0))
    >>> round(frechet_distance(one, two), 9)
    2.0
    """
    overlap = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    variances = a.factor.square().sum() + b.factor.square().sum()
    # equal Gaussians may fall below 0 by rounding
    return max(float((a.mean - b.mean).square().sum() + variances - 2 * overlap), 0.0)


def as_double(array: np.ndarray | Tensor) -> Tensor:
    """In float64 on the CPU."""
    if isinstance(array, Tensor):
        return array.to(device="cpu", dtype=torch.float64)
    # copied: torch takes no array that is read backwards or may not be written to
    return torch.from_numpy(np.array(array, dtype=np.float64))


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased estimate, the mean over subsets, and its standard error; None where there is a single subset."""

    value: float
    standard_error: float | None
    num_subsets: int
    subset_size: int


def kernel_distance(
    samples: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    *,
    num_subsets: int = 100,
    subset_size: int | None = None,
) -> KernelDistance:
    """Squared MMD under the kernel (x.y / d + 1)^3, averaged over subsets.

    A cut takes as many images of both sets as the smaller one fills whole subsets with, and divides them into disjoint
    subsets. The next cut goes on where the last one stopped in the shuffled set, which is shuffled again when it ends:
    there are cuts until every image of both sets was used and there are `num_subsets` subsets. The subsets of one cut
    are independent, so their spread gives a standard error; further cuts lower the noise of the value, which the error,
    the mean over cuts, does not claim.

    Args:
        num_subsets: at least so many.
        subset_size: images per subset; None takes 1,000, or a tenth of the smaller set where that is less.

    Raises:
        UserError: fewer than two images, different widths, or a subset that is larger than a set.
    """
    smaller = min(len(samples), len(reference))
    if smaller < 2 or samples.shape[1] != reference.shape[1] or num_subsets < 1:
        raise UserError(
            "a kernel distance needs at least 2 images in both sets, features of one width and a subset, got "
            f"{samples.shape}, {reference.shape} and {num_subsets} subsets."
        )
    size = max(min(1000, smaller // 10), 2) if subset_size is None else subset_size
    if not 2 <= size <= smaller:
        raise UserError(f"subset_size must lie in 2..{smaller} (the smaller set), got {size}. Leave it out.")
    generator, per_cut = np.random.default_rng(0), smaller // size
    cuts = max(-(-num_subsets // per_cut), -(-max(len(samples), len(reference)) // (per_cut * size)))
    ours, theirs = (_endless_cuts(generator, len(rows), per_cut * size) for rows in (samples, reference))
    values, errors = [], []
    for _ in range(cuts):
        pairs = zip(next(ours).reshape(per_cut, size), next(theirs).reshape(per_cut, size), strict=True)
        # of both sets only the subsets in hand are in float64
        cut = [squared_mmd(np.asarray(samples[i], float), np.asarray(reference[j], float)) for i, j in pairs]
        values += cut
        if per_cut > 1:
            errors.append(np.std(cut, ddof=1) / per_cut**0.5)
    return KernelDistance(float(np.mean(values)), float(np.mean(errors)) if errors else None, len(values), size)


def squared_mmd(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Unbiased squared maximum mean discrepancy under (x.y / d + 1)^3: the pairs of a row with itself are left out.

    >>> a, b = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    >>> squared_mmd(a, b)  # 1 + 27 - 2 (1 + 1 + 8 + 27) / 4
    9.5
    """
    n, m = len(a), len(b)
    within_a, within_b, between = (_kernel(x, y) for x, y in ((a, a), (b, b), (a, b)))
    own = (within_a.sum() - np.trace(within_a)) / (n * (n - 1)) + (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(own - 2 * between.mean())


def frechet_over_chunks(samples: Float[np.ndarray, "n d"], reference: Gaussian, *, chunk_size: int) -> Measurements:
    """Frechet distance of disjoint chunks of the samples to the reference.

    The samples are shuffled first, so that files sorted by class give chunks of all classes; what is left over after
    the last whole chunk is not used. Raises UserError where `chunk_size` is below 2 or above the number of samples.
    """
    if not 2 <= chunk_size <= len(samples):
        raise UserError(f"chunk_size must lie in 2..{len(samples)} (the samples), got {chunk_size}.")
    order = np.random.default_rng(0).permutation(len(samples))[: len(samples) // chunk_size * chunk_size]
    chunks = order.reshape(-1, chunk_size)
    return Measurements.of([frechet_distance(Gaussian.of(samples[rows]), reference) for rows in chunks])


def _endless_cuts(generator: np.random.Generator, total: int, count: int) -> Iterator[Int[np.ndarray, " count"]]:
    """Different indices below `total`, `count` at a time; no index comes again before all others came."""
    left = np.empty(0, np.int64)
    while True:
        cut, left = left[:count], left[count:]
        if len(cut) < count:
            # the end of one shuffle and the beginning of the next, which must not repeat it within the cut
            fresh = generator.permutation(total)
            early, late = fresh[~np.isin(fresh, cut)], fresh[np.isin(fresh, cut)]
            missing = count - len(cut)
            cut, left = np.concatenate([cut, early[:missing]]), np.concatenate([early[missing:], late])
        yield cut


def _kernel(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    return (a @ b.T / a.shape[1] + 1) ** 3
