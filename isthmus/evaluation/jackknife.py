"""What disjoint groups of images say of a score: its standard error, and that of a difference of two scores.

A score of n images has a value for each of 20 groups (Tukey's pseudo-values): their mean is the score and their spread
its error. Image i is in the same group whatever was drawn, so two models that were asked for the same images, or
measured on the same ones, are subtracted group by group: what makes an image hard for both, and the reference that both
are measured against, cancels. Source: Efron and Stein 1981, "The Jackknife Estimate of Variance".
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from isthmus.evaluation.statistics import Gaussian, Measurements, frechet_distance, squared_mmd

NUM_GROUPS = 20
Parts = list[float]
"""A value for each group; empty where there are too few images for groups."""


def groups_of(count: int) -> list[Int[np.ndarray, " _"]]:
    """Indices of `count` images in each group, mixed, so that classes which take turns are in all; none for few images.

    >>> len(groups_of(100)), sorted(np.concatenate(groups_of(100)).tolist()) == list(range(100)), groups_of(39)
    (20, True, [])
    """
    if count < 2 * NUM_GROUPS:
        return []
    return np.array_split(np.random.default_rng(0).permutation(count), NUM_GROUPS)


def mean_parts(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> Parts:
    """Of a mean over images: that of every group.

    >>> mean_parts(np.full(40, 2.0)) == [2.0] * 20
    True
    """
    return [float(np.mean(values[group])) for group in groups_of(len(values))]


def frechet_parts(samples: Float[np.ndarray, "n d"], reference: Gaussian) -> Parts:
    """Of the Frechet distance of all samples: 20 times it, less 19 times what it is without a group."""
    groups = groups_of(len(samples))
    return _pseudo_values(groups, lambda kept: frechet_distance(Gaussian.of(samples[kept]), reference), len(samples))


def rebuilt_parts(rebuilt: Float[np.ndarray, "n d"], originals: Float[np.ndarray, "n d"]) -> Parts:
    """Of the Frechet distance of reconstructions to their originals, row by row: a group is left out of both."""
    groups = groups_of(len(rebuilt))
    return _pseudo_values(
        groups,
        lambda kept: frechet_distance(Gaussian.of(rebuilt[kept]), Gaussian.of(originals[kept])),
        len(rebuilt),
    )


def kernel_parts(samples: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> Parts:
    """Of the kernel distance: each group against as many reference images of its own, which is unbiased."""
    ours, theirs = groups_of(len(samples)), groups_of(len(reference))
    # a side of few images has no groups, and then there are no parts
    return [
        squared_mmd(np.asarray(samples[one], float), np.asarray(reference[other], float))
        for one, other in zip(ours, theirs, strict=False)
    ]


def error_of(parts: Sequence[float]) -> float | None:
    """Standard error of a score from its parts; None where there are none."""
    found = Measurements.of(parts) if parts else None
    return None if found is None or found.deviation is None else found.deviation / found.count**0.5


def _pseudo_values(
    groups: Sequence[Int[np.ndarray, " _"]], score: Callable[[Int[np.ndarray, " _"]], float], count: int
) -> Parts:
    if not groups:
        return []
    everything = np.arange(count)
    whole = score(everything)
    return [NUM_GROUPS * whole - (NUM_GROUPS - 1) * score(np.delete(everything, group)) for group in groups]
