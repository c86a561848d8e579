"""What the nearest neighbours in feature space say: fidelity, variety, and whether samples are copies.

Precision and recall: Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric", section 2 (k = 3). Density and
coverage: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics", equations 1 and 2 (k = 5). Everything is exact
and runs in blocks, so that no matrix of all pairs is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError

_BLOCK_ROWS = 1024


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
    samples, real = _around(real, samples, real)
    radii = neighbour_distances(real, k=largest, block_size=block_size)
    narrow, wide = radii[:, precision_k - 1], radii[:, density_k - 1]
    sample_radius = neighbour_distances(samples, k=precision_k, block_size=block_size)[:, -1]
    realistic, density = np.zeros(len(samples), bool), np.zeros(len(samples))
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start, distances in _blocks(samples, real, block_size):
        rows = slice(start, start + len(distances))
        realistic[rows] = (distances <= narrow).any(axis=1)
        recalled |= (distances <= sample_radius[rows, None]).any(axis=0)
        inside = distances <= wide
        density[rows] = inside.sum(axis=1) / density_k
        covered |= inside.any(axis=0)
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
    (centred,) = _around(rows, rows)
    found = np.empty((len(rows), k))
    for start, distances in _blocks(centred, centred, block_size):
        own = np.arange(len(distances))
        distances[own, start + own] = np.inf
        nearest = torch.from_numpy(distances).topk(k, dim=1, largest=False).values
        found[start : start + len(distances)] = nearest.numpy()
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
    index = np.zeros(len(queries), dtype=np.int64)
    left, right = _around(references, queries, references)
    for start, distances in _blocks(left, right, block_size):
        index[start : start + len(distances)] = distances.argmin(axis=1)
    # by differences: the products that found the neighbour put it a rounding error away
    difference = np.asarray(queries, np.float64) - np.asarray(references, np.float64)[index]
    return index, np.linalg.norm(difference, axis=1)


def memorised(
    samples: Float[np.ndarray, "n d"],
    training: Float[np.ndarray, "m d"],
    held_out: Float[np.ndarray, "k d"],
    *,
    quantile: float = 0.01,
) -> Bool[np.ndarray, " n"]:
    """Which samples are nearer to a training image than (nearly) every held-out image is; the mean is the share.

    The threshold is the `quantile` of the held-out images' distances to their nearest training image. Held-out images
    were not copied, so about `quantile` is what a model without memory scores; 1 means that every sample is a copy.

    Raises:
        UserError: there are no samples, no training or no held-out images.
    """
    if not len(samples) or not len(held_out):
        raise UserError(
            f"the share of copies needs samples and held-out images, got {len(samples)} and {len(held_out)}. Pass both."
        )
    threshold = np.quantile(nearest_neighbours(held_out, training)[1], quantile)
    return nearest_neighbours(samples, training)[1] < threshold


def _around(centre: np.ndarray, *sets: np.ndarray) -> tuple[Float[np.ndarray, "_ d"], ...]:
    """Sets in float64, moved so that `centre` has mean 0: distances stay, products lose fewer digits."""
    widths = {rows.shape[1] for rows in (centre, *sets)}
    if len(widths) > 1:
        raise UserError(f"both sets need features of one width, got {sorted(widths)}. Use one network for all images.")
    mean = np.asarray(centre, np.float64).mean(axis=0)
    return tuple(np.asarray(rows, np.float64) - mean for rows in sets)


def _blocks(
    queries: Float[np.ndarray, "n d"], references: Float[np.ndarray, "m d"], block_size: int
) -> Iterator[tuple[int, Float[np.ndarray, "_ m"]]]:
    """Distances of `block_size` queries at a time to all references, with the number of the first query."""
    right = torch.from_numpy(references)
    right_norms = right.square().sum(dim=1)
    for start in range(0, len(queries), block_size):
        left = torch.from_numpy(queries[start : start + block_size])
        yield start, _distances(left, left.square().sum(dim=1), right, right_norms).numpy()


def _distances(
    left: Float[Tensor, "n d"], left_norms: Float[Tensor, " n"], right: Float[Tensor, "m d"], norms: Float[Tensor, " m"]
) -> Float[Tensor, "n m"]:
    sizes = left_norms[:, None] + norms
    squared = torch.addmm(sizes, left, right.T, alpha=-2)
    # what the product of equal rows leaves over is rounding: equal rows are at distance 0
    return squared.masked_fill_(squared < 1e-13 * sizes, 0).sqrt_()
