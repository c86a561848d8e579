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

_BLOCK_ROWS = 2048  # a tile of distances is 32 MiB, whatever the number of images


@dataclass(frozen=True, eq=False)
class ManifoldScores:
    """Values per image, of which these scores are the means.

    Attributes:
        precision: 1 where the sample lies in the ball of some real image.
        recall: 1 where the real image lies in the ball of some sample.
        density: balls of real images that hold the sample, over k; the mean may exceed 1.
        coverage: 1 where the ball of the real image holds some sample.
    """

    precision: Float[np.ndarray, " n"]
    recall: Float[np.ndarray, " m"]
    density: Float[np.ndarray, " n"]
    coverage: Float[np.ndarray, " m"]


def manifold_scores(
    samples: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "m d"],
    *,
    precision_k: int = 3,
    density_k: int = 5,
    block_size: int = _BLOCK_ROWS,
) -> ManifoldScores:
    """Precision and recall with balls reaching the `precision_k`-th neighbour, density and coverage the `density_k`-th.

    Precision and recall change with the number of images: compare them at equal n and m. Raises UserError where a set
    has no more images than its k.
    """
    largest = max(precision_k, density_k)
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
    return ManifoldScores(realistic.astype(float), recalled.astype(float), density, covered.astype(float))


def neighbour_distances(
    rows: Float[np.ndarray, "n d"], *, k: int, block_size: int = _BLOCK_ROWS
) -> Float[np.ndarray, "n k"]:
    """Euclidean distances of every row to its k nearest others, nearest first; a row is not its own neighbour.

    Raises UserError where there are not more than k rows.
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
    """Index of the nearest reference of each query, and its Euclidean distance: 0 exactly for a copy."""
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


def copy_distance(held_out: Float[np.ndarray, " k"]) -> float:
    """Nearer samples count as copies; `held_out` are distances of held-out images to their nearest training image."""
    return float(np.quantile(held_out, COPY_QUANTILE))


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

    >>> nearer_than(np.array([0.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])).tolist()
    [1.0, 0.625, 0.0]
    """
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
    mean = references.mean(axis=0, dtype=np.float64)

    def block(rows: np.ndarray, start: int) -> tuple[slice, Tensor, Tensor]:
        values = torch.from_numpy(rows[start : start + block_size].astype(np.float64) - mean)
        return slice(start, start + len(values)), values, values.square().sum(dim=1)

    for here in range(0, len(queries), block_size):
        rows, left, left_norms = block(queries, here)
        for there in range(0, len(references), block_size):
            columns, right, right_norms = block(references, there)
            sizes = left_norms[:, None] + right_norms
            squared = torch.addmm(sizes, left, right.T, alpha=-2)
            # what the product of equal rows leaves over is rounding: equal rows are at distance 0
            yield rows, columns, squared.masked_fill_(squared < 1e-13 * sizes, 0).sqrt_().numpy()
