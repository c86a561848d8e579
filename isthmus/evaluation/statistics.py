"""Distances between sets of features, and how sure a number is.

Frechet distance: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6; Dowson and Landau
1982; Gaussians are fitted while features stream by, in float64. Its bias depends on the number of images, so it is
measured on disjoint chunks of one fixed size. Kernel distance (KID): Binkowski et al. 2018, "Demystifying MMD GANs",
section 3 and equation 4 (unbiased, so it may be negative).

A share of images (0 or 1 for each) has Wilson's interval: a bootstrap of none or of all says that nothing is unsure. A
distance between sets is never bootstrapped: drawing with replacement repeats images, which narrows the set and pushes a
Frechet distance up. Distances are measured on disjoint chunks of the samples, or on several seeds, and spread there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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


# rows that are centred at once: 4,096 x 2,048 doubles are 64 MiB
_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of a set of features, the covariance as a factor A with A A^T = covariance.

    The factor is what a Frechet distance needs, so it is computed once, however many distances follow. It has as many
    columns as the covariance has rank: few images cost little, and directions without variance add no rounding error.

    Attributes:
        mean: (d,).
        factor: (d, rank).
    """

    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "d rank"]

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The covariance itself."""
        return self.factor @ self.factor.T

    @classmethod
    def from_covariance(
        cls, mean: Float[np.ndarray, " d"] | Float[Tensor, " d"], covariance: Float[np.ndarray, "d d"] | Tensor
    ) -> "Gaussian":
        """Of a mean and covariance that are known, such as `mu` and `sigma` of an ADM file.

        Raises:
            UserError: the covariance is not a symmetric matrix without negative eigenvalues that fits the mean.
        """
        mean, covariance = _double(mean), _double(covariance)
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
        """Fitted to rows that are in memory; the covariance is the unbiased one.

        Raises:
            UserError: fewer than two rows, or values that are not finite.
        """
        count, width = rows.shape
        if 2 <= count <= width and np.isfinite(rows).all():
            # the centred rows are a factor already: no eigenvalue problem of a rank-deficient d x d matrix
            values = _double(rows)
            mean = values.mean(dim=0)
            return cls(mean, ((values - mean) / (count - 1) ** 0.5).T.contiguous())
        statistics = GaussianStatistics(width)
        statistics.update(rows)
        return statistics.gaussian()


class GaussianStatistics:
    """Mean and covariance of features that arrive in parts; memory is that of one d x d matrix and a block of rows.

    Args:
        width: d, numbers per row.

    >>> statistics = GaussianStatistics(1)
    >>> statistics.update(np.array([[1.0], [2.0]]))
    >>> statistics.update(np.array([[6.0]]))
    >>> statistics.count, statistics.mean.item(), statistics.covariance.item()
    (3, 3.0, 7.0)
    """

    def __init__(self, width: int):
        self.width = width
        self.count = 0
        self.mean: Float[Tensor, " d"] = torch.zeros(width, dtype=torch.float64)
        # sum of the outer products of deviations from the mean
        self._scatter: Float[Tensor, "d d"] = torch.zeros(width, width, dtype=torch.float64)

    def update(self, rows: Float[np.ndarray, "n d"] | Float[Tensor, "n d"]) -> None:
        """Take in more rows.

        Raises:
            UserError: rows of another width, or not finite.
        """
        if rows.shape[1] != self.width:
            raise UserError(f"features must be {self.width} wide, got {rows.shape[1]}. Use one network for all images.")
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = _double(rows[start : start + _BLOCK_ROWS])
            if not bool(torch.isfinite(block).all()):
                raise UserError("features must be finite, got NaN or infinity. Look at the images they were made of.")
            mean = block.mean(dim=0)
            centred = block - mean
            self._add(len(block), mean, centred.T @ centred)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Unbiased covariance. Raises `UserError` for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}. Measure more images.")
        return self._scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """The Gaussian with this mean and covariance. Raises `UserError` for fewer than two rows."""
        return Gaussian.from_covariance(self.mean, self.covariance)

    def _add(self, count: int, mean: Float[Tensor, " d"], scatter: Float[Tensor, "d d"]) -> None:
        # Chan, Golub and LeVeque 1979: the parts' own scatter, plus that of their means
        total, step = self.count + count, mean - self.mean
        self._scatter += scatter
        self._scatter.addr_(step, step, alpha=self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def frechet_distance(a: Gaussian | GaussianStatistics, b: Gaussian | GaussianStatistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), the squared Wasserstein-2 distance of two Gaussians.

    With S1 = A A^T and S2 = B B^T the last trace is the sum of the singular values of A^T B, which needs no root of a
    matrix and loses no digits where the covariances are of low rank.

    Raises:
        UserError: the two are of different widths, or one has seen fewer than two rows.

    >>> one, two = (Gaussian.from_covariance(np.zeros(2), np.eye(2) * v) for v in (1.0, 4.0))
    >>> round(frechet_distance(one, two), 9)
    2.0
    """
    a, b = (one.gaussian() if isinstance(one, GaussianStatistics) else one for one in (a, b))
    if len(a.mean) != len(b.mean):
        raise UserError(f"both sets need features of one width, got {len(a.mean)} and {len(b.mean)}.")
    overlap = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    variances = a.factor.square().sum() + b.factor.square().sum()
    distance = (a.mean - b.mean).square().sum() + variances - 2 * overlap
    # equal Gaussians may fall below 0 by rounding
    return max(float(distance), 0.0)


def _double(array: np.ndarray | Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array.to(device="cpu", dtype=torch.float64)
    # copied: torch takes no array that is read backwards or may not be written to
    return torch.from_numpy(np.array(array, dtype=np.float64))


@dataclass(frozen=True)
class KernelDistance:
    """An unbiased estimate and how far it may be off.

    Attributes:
        value: mean over the subsets.
        standard_error: of `value`; None where there is a single subset.
        num_subsets: subsets drawn.
        subset_size: images of each set in a subset.
    """

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
    seed: int = 0,
) -> KernelDistance:
    """Squared MMD under the kernel (x.y / d + 1)^3, averaged over subsets.

    A cut takes as many images of both sets as the smaller one fills whole subsets with, and divides them into disjoint
    subsets. The next cut goes on where the last one stopped in the shuffled set, which is shuffled again when it ends:
    there are cuts until every image of both sets was used and there are `num_subsets` subsets. The subsets of one cut
    are independent, so their spread gives a standard error; further cuts lower the noise of the value, which the error,
    the mean over cuts, does not claim.

    Args:
        samples: features of one set.
        reference: features of the other.
        num_subsets: at least so many subsets.
        subset_size: images per subset; None takes 1,000, or a tenth of the smaller set where that is less.
        seed: of the shuffles.

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
    generator, per_cut = np.random.default_rng(seed), smaller // size
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
    return KernelDistance(
        float(np.mean(values)), float(np.mean(errors)) if errors else None, num_subsets=len(values), subset_size=size
    )


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


def frechet_over_chunks(
    samples: Float[np.ndarray, "n d"], reference: Gaussian, *, chunk_size: int, seed: int = 0
) -> Spread:
    """Frechet distance of disjoint chunks of the samples to the reference: mean, and spread between chunks.

    The samples are shuffled first, so that files sorted by class give chunks of all classes; samples left over after
    the last whole chunk are not used.

    Raises:
        UserError: `chunk_size` is below 2 or above the number of samples.
    """
    if not 2 <= chunk_size <= len(samples):
        raise UserError(f"chunk_size must lie in 2..{len(samples)} (the samples), got {chunk_size}.")
    chunks = _subsets(np.random.default_rng(seed), len(samples), len(samples) // chunk_size, chunk_size)
    return spread([frechet_distance(Gaussian.of(samples[rows]), reference) for rows in chunks])


def _subsets(generator: np.random.Generator, total: int, number: int, size: int) -> Int[np.ndarray, "number size"]:
    return generator.permutation(total)[: number * size].reshape(number, size)


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
