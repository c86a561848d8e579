"""The pyramid of scales: which sides there are, which phi follows each, and maps of one side made of another.

Source: Tian et al., "Visual Autoregressive Modeling", algorithms 1 and 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import UserError
from isthmus.nn.shapes import FeatureMap, LatentMap, ScaleTokens


def default_phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Which of `num_phi` convolutions follows each scale: the one whose tick is nearest to k / (K - 1).

    Ticks are evenly spaced from 1/(3n) to 1 - 1/(3n) for n = 4 and from 1/(2n) otherwise. For ten scales and four phi
    two scales lie half-way between ticks and float64 rounding decides, on which the published weights depend.

    >>> default_phi_indices(10, 4)
    (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    """
    if num_scales == 1 or num_phi == 1:
        return (0,) * num_scales
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    step = (1 - edge - edge) / (num_phi - 1)
    ticks = [edge + i * step for i in range(num_phi - 1)] + [1 - edge]
    return tuple(
        min(range(num_phi), key=lambda n, at=k / (num_scales - 1): abs(ticks[n] - at)) for k in range(num_scales)
    )


@dataclass(frozen=True)
class ScaleSchedule:
    """Sides of the scales, coarse to fine, and the phi convolution that follows each.

    >>> schedule = ScaleSchedule((1, 2, 4), (0, 1, 3))
    >>> schedule.lengths, schedule.num_tokens, schedule.offsets
    ((1, 4, 16), 21, (0, 1, 5, 21))
    """

    sizes: tuple[int, ...]
    phi_indices: tuple[int, ...]

    def __post_init__(self):
        sizes, phi = tuple(map(int, self.sizes)), tuple(map(int, self.phi_indices))
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "phi_indices", phi)
        if not sizes or sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
            raise UserError(
                f"scale_sizes must be positive and increase from scale to scale, got {sizes}. "
                "Pass for example 1,2,3,4,6,8, ending at the side of the latent grid."
            )
        if len(phi) != len(sizes) or min(phi) < 0:
            raise UserError(
                f"phi_indices needs one non-negative integer per scale ({len(sizes)} scales), got {phi}. "
                "Leave it out to take the published rule."
            )

    @property
    def grid(self) -> int:
        """Side of the last scale, which is the side of the latent map."""
        return self.sizes[-1]

    @property
    def num_scales(self) -> int:
        """Number of scales K."""
        return len(self.sizes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every scale."""
        return tuple(s * s for s in self.sizes)

    @property
    def num_tokens(self) -> int:
        """Tokens of all scales together (L)."""
        return sum(self.lengths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where every scale starts in the sequence of all tokens, and the total at the end (K + 1 entries)."""
        return tuple(sum(self.lengths[:k]) for k in range(self.num_scales + 1))

    def derive(self, sizes: Sequence[int]) -> "ScaleSchedule":
        """A schedule on the same tokenizer: every side keeps the phi this schedule gives it (spec of SRDD, 3.3).

        >>> official = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), default_phi_indices(10, 4))
        >>> official.derive((1, 3, 5, 8, 13, 16)).phi_indices
        (0, 1, 1, 2, 3, 3)
        """
        sizes, phi_of = tuple(map(int, sizes)), dict(zip(self.sizes, self.phi_indices, strict=True))
        if not sizes or sizes[-1] != self.grid or not phi_of.keys() >= set(sizes):
            raise UserError(
                f"scale_sizes must be those of the image tokenizer, {self.sizes}, or some of them ending at "
                f"{self.grid}, got {sizes}. Pass such sides, or the tokenizer that the transformer was trained on."
            )
        return ScaleSchedule(sizes, tuple(phi_of[side] for side in sizes))


def area_downsample(features: FeatureMap, size: int) -> Float[Tensor, "b d {size} {size}"]:
    """Average over the cells of a size x size grid; cells overlap where `size` does not divide the side."""
    # area, not bilinear: the published tokenizer was trained on averaged residuals
    return features if features.shape[-1] == size else F.interpolate(features, size=(size, size), mode="area")


def bicubic_upsample(features: FeatureMap, size: int) -> Float[Tensor, "b d {size} {size}"]:
    """Bicubic to size x size: half-pixel centres, a = -0.75, edges clamped, no antialiasing."""
    if features.shape[-1] == size:
        return features
    return F.interpolate(features, size=(size, size), mode="bicubic", align_corners=False)


@dataclass
class Scale:
    """One turn of the residual loop: the tokens of scale k = `index`, row by row, and the features, which are the sum
    over scales 0..k ("Fhat" of the paper).
    """

    index: int
    token_ids: ScaleTokens
    features: LatentMap


def next_scale_input(features: LatentMap, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "b l d"]:
    """What the transformer reads at `scale` >= 1: the features so far, averaged to its side, one row per token."""
    return area_downsample(features, schedule.sizes[scale]).flatten(2).transpose(1, 2)


def tokens_to_map(rows: Float[Tensor, "b l d"]) -> FeatureMap:
    """Rows of a square scale as a map (b, d, s, s)."""
    size = int(rows.shape[1] ** 0.5)
    return rows.transpose(1, 2).unflatten(2, (size, size))
