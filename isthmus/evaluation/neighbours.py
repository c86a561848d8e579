"""What the nearest neighbours in feature space say: fidelity, variety, and whether samples are copies.

Precision and recall: Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric", section 2 (k = 3). Density and
coverage: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics", equations 1 and 2 (k = 5). Everything is exact
and runs in blocks of both sets, so that neither all pairs nor a copy of the features in float64 is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError

COPY_QUANTILE = 0.01
"""Share of the held-out images that may be as near to a training image as what counts as a copy."""

# a tile of distances is 32 MiB, whatever the number of images
_BLOCK_ROWS = 2048


@dataclass(frozen=True, eq=False)
class ManifoldScores:
    """Per image, so that means and their intervals follow.

    Attributes:
        realistic: sample lies in the ball of some real image; its mean is the precision.
        recalled: real image lies in the ball of some sample; its mean is the recall.
        density: balls of real images that hold the sample, over k; its mean is the density, which may exceed 1.
        covered: the ball of the real image holds some sample; its mean is the coverage.
    """

    realistic: Bool[np.ndarray, " n"]
    recalled: Bool[np.ndarray, " m"]
    density: Float[np.ndarray, " n"]
    covered: Bool[np.ndarray, " m"]

    def values(self) -> dict[str, Float[np.ndarray, "..."]]:
        """The values behind precision, recall, density and coverage, by name."""
        return {
            "precision": self.realistic.astype(float),
            "recall": self.recalled.astype(float),
            "density": self.density,
            "coverage": self.covered.astype(float),
        }


def manifold_scores(
    samples: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "m d"],
    *,
    precision_k: int = 3,
    density_k: int = 5,
    block_size: int = _BLOCK_ROWS,
) -> ManifoldScores:
    """Precision and recall with balls reaching the `precision_k`-th neighbour, density and coverage the `density_k`-th.

    Precision and recall change with the number of images: compare them at equal n and m.

    Raises:
        UserError: a set has too few images for its k, or the sets are of different widths.
    """
    largest = max(precision_k, density_k)
    if min(precision_k, density_k) < 1 or len(real) <= largest or len(samples) <= precision_k:
        raise UserError(
            f"the {largest}-th nearest neighbour needs more than {largest} images, got {len(samples)} samples and "
            f"{len(real)} real images. Measure more images."
        )
    radii = neighbour_distances(real, k=largest, block_size=block_size)
    narrow, wide = radii[:, precision_k - 1], radii[:, density_k - 1]
    sample_radius = neighbour_distances(samples, k=precision_k, block_size=block_size)[:, -1]
    realistic, density = np.zeros(len(samples), bool), np.zeros(len(samples))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, columns, distances in _tiles(samples, real, block_size):
        realistic[rows] |= (distances <= narrow[columns]).any(axis=1)
        recalled[columns] |= (distances <= sample_radius[rows, None]).any(axis=0)
        inside = distances <= wide[columns]
        density[rows] += inside.sum(axis=1) / density_k
        covered[columns] |= inside.any(axis=0)
    return ManifoldScores(realistic, recalled, density, covered)


def neighbour_distances(
    rows: Float[np.ndarray, "n d"], *, k: int, block_size: int = _BLOCK_ROWS
) -> Float[np.ndarray, "n k"]:
    """Euclidean distances of every row to its k nearest others, nearest first; a row is not its own neighbour.

    Raises:
        UserError: there are not more than k rows.
    """
    if not 1 <= k < len(rows):
        raise UserError(f"{k} neighbours need more than {k} images, got {len(rows)}. Measure more images.")
    found = np.full((len(rows), k), np.inf)
    for here, there, distances in _tiles(rows, rows, block_size):
        if here == there:
            np.fill_diagonal(distances, np.inf)
        candidates = torch.from_numpy(np.concatenate([found[here], distances], axis=1))
        found[here] = candidates.topk(k, dim=1, largest=False).values.numpy()
    return found


def nearest_neighbours(
    queries: Float[np.ndarray, "n d"], references: Float[np.ndarray, "m d"], *, block_size: int = _BLOCK_ROWS
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Index of the nearest reference of each query, and its Euclidean distance: 0 exactly for a copy.

    Raises:
        UserError: there is no reference.
    """
    if not len(references):
        raise UserError("nearest neighbours need at least one reference, got none. Pass the training features.")
    index, distance = np.zeros(len(queries), dtype=np.int64), np.full(len(queries), np.inf)
    for rows, columns, distances in _tiles(queries, references, block_size):
        best = distances.argmin(axis=1)
        found = distances[np.arange(len(best)), best]
        nearer = found < distance[rows]
        index[rows] = np.where(nearer, columns.start + best, index[rows])
        distance[rows] = np.where(nearer, found, distance[rows])
    for start in range(0, len(queries), block_size):
        rows = slice(start, start + block_size)
        # by differences: the products that found the neighbour put it a rounding error away
        difference = np.asarray(queries[rows], np.float64) - np.asarray(references[index[rows]], np.float64)
        distance[rows] = np.linalg.norm(difference, axis=1)
    return index, distance


def memorised(
    samples: Float[np.ndarray, "n d"],
    training: Float[np.ndarray, "m d"],
    held_out: Float[np.ndarray, "k d"],
    *,
    quantile: float = COPY_QUANTILE,
) -> Bool[np.ndarray, " n"]:
    """Which samples are nearer to a training image than (nearly) every held-out image is; the mean is the share.

    Held-out images were not copied, so about `quantile` is what a model without memory scores; 1 means that every
    sample is a copy.

    Raises:
        UserError: there are no samples, no training or no held-out images.
    """
    if not len(samples) or not len(held_out):
        raise UserError(
            f"the share of copies needs samples and held-out images, got {len(samples)} and {len(held_out)}. Pass both."
        )
    return copies(nearest_neighbours(samples, training)[1], copy_distance(held_out, training, quantile=quantile))


def copy_distance(
    held_out: Float[np.ndarray, "k d"], training: Float[np.ndarray, "m d"], *, quantile: float = COPY_QUANTILE
) -> float:
    """The `quantile` of the held-out images' distances to their nearest training image; 0 where so many equal one.

    Raises:
        UserError: there are no training or no held-out images.
    """
    if not len(held_out):
        raise UserError("the share of copies needs held-out images, got none. Pass the held-out features.")
    return float(np.quantile(nearest_neighbours(held_out, training)[1], quantile))


def copies(distances: Float[np.ndarray, " n"], threshold: float) -> Bool[np.ndarray, " n"]:
    """Which of these distances to the nearest training image are those of copies: below the threshold, or 0.

    >>> copies(np.array([0.0, 1.0, 2.0]), 2.0).tolist(), copies(np.array([0.0, 1.0]), 0.0).tolist()
    ([True, True, False], [True, False])
    """
    return (distances < threshold) | (distances == 0)


def nearer_than(distances: Float[np.ndarray, " n"], held_out: Float[np.ndarray, " k"]) -> Float[np.ndarray, " n"]:
    """For every distance the share of `held_out` that it is below, ties counting half; the mean is 0.5 for equal laws.

    The statistic of Mann and Whitney, as Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying in
    Generative Models", section 3, apply it to distances to the nearest training image.

    Raises:
        UserError: there is no held-out distance.

    >>> nearer_than(np.array([0.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
    [1.0, 0.625, 0.0]
    """
    if not len(held_out):
        raise UserError("distances are compared with those of held-out images, got none. Pass the held-out features.")
    ordered = np.sort(held_out)
    below, up_to = (np.searchsorted(ordered, distances, side=side) for side in ("left", "right"))
    return 1 - (below + up_to) / (2 * len(ordered))


def _tiles(
    queries: Float[np.ndarray, "n d"], references: Float[np.ndarray, "m d"], block_size: int
) -> Iterator[tuple[slice, slice, Float[np.ndarray, "_ _"]]]:
    """Distances of `block_size` queries to as many references at a time, with the rows of both.

    Only the blocks in hand are in float64, moved so that the references have mean 0: distances stay, and products lose
    fewer digits.
    """
    if queries.shape[1] != references.shape[1]:
        widths = sorted({queries.shape[1], references.shape[1]})
        raise UserError(f"both sets need features of one width, got {widths}. Use one network for all images.")
    mean = references.mean(axis=0, dtype=np.float64)

    def block(rows: np.ndarray, start: int) -> tuple[slice, Tensor, Tensor]:
        values = torch.from_numpy(rows[start : start + block_size].astype(np.float64) - mean)
        return slice(start, start + len(values)), values, values.square().sum(dim=1)

    for here in range(0, len(queries), block_size):
        rows, left, left_norms = block(queries, here)
        for there in range(0, len(references), block_size):
            columns, right, right_norms = block(references, there)
            yield rows, columns, _distances(left, left_norms, right, right_norms).numpy()


def _distances(
    left: Float[Tensor, "n d"], left_norms: Float[Tensor, " n"], right: Float[Tensor, "m d"], norms: Float[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    sizes = left_norms[:, None] + norms
    squared = torch.addmm(sizes, left, right.T, alpha=-2)
    # what the product of equal rows leaves over is rounding: equal rows are at distance 0
    return squared.masked_fill_(squared < 1e-13 * sizes, 0).sqrt_()
