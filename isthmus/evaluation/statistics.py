"""Gaussians fitted to features while they stream by, and the Frechet distance between two of them.

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6; Dowson and Landau 1982.
All arithmetic is in float64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import UserError

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
