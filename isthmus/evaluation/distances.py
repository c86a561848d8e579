"""Distances between two sets of images by their features, each with its uncertainty.

Kernel distance (KID): Binkowski et al. 2018, "Demystifying MMD GANs", section 3 and equation 4 (unbiased, so it may be
negative). Frechet distance: `isthmus.evaluation.statistics`; its bias depends on the number of images, so it is
measured on disjoint chunks of one fixed size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from isthmus.errors import UserError
from isthmus.evaluation.intervals import Spread, spread
from isthmus.evaluation.statistics import Gaussian, frechet_distance


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
