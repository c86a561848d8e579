"""Residual quantisation over scales: one loop that encoding, decoding, teacher forcing and sampling share.

Source: Tian et al., "Visual Autoregressive Modeling", algorithms 1 and 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.functional.pyramid import ScaleSchedule, area_downsample, bicubic_upsample
from isthmus.functional.shapes import FeatureMap, LatentMap, ScaleTokens

# rows of the distance matrix held at once: 8,192 x 4,096 codes are 128 MiB in fp32
_SEARCH_CHUNK = 8_192


def nearest_code(
    latents: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], *, normalize: bool = False
) -> Int[Tensor, " n"]:
    """Index of the nearest code: smallest Euclidean distance, or largest cosine where `normalize`.

    Always in fp32: a tie broken another way in half precision is another image.

    >>> nearest_code(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([1])
    """
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        latents, codebook = latents.float(), codebook.float()
        if normalize:
            latents, codebook = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
            found = [(part @ codebook.T).argmax(dim=1) for part in latents.split(_SEARCH_CHUNK)]
        else:
            # |z|^2 is the same for every code, so |e|^2 - 2 z.e orders the codes as the distance does
            squares = codebook.square().sum(dim=1)
            found = [
                torch.addmm(squares, part, codebook.T, alpha=-2).argmin(dim=1) for part in latents.split(_SEARCH_CHUNK)
            ]
        return torch.cat(found)


@dataclass
class Scale:
    """One turn of the residual loop.

    Attributes:
        index: scale k, from 0.
        token_ids: (b, s_k * s_k), row by row.
        features: (b, d, grid, grid), the sum over scales 0..k ("Fhat" of the paper).
    """

    index: int
    token_ids: ScaleTokens
    features: LatentMap


def residual_scales(
    start: LatentMap,
    schedule: ScaleSchedule,
    choose: Callable[[int, LatentMap], tuple[ScaleTokens, FeatureMap]],
    phi: Callable[[int, LatentMap], LatentMap],
) -> Iterator[Scale]:
    """Build the features scale by scale, from zero: features += phi_k(upsample(codes_k)).

    Args:
        start: zeros of (b, d, grid, grid), which fix batch, device and type.
        schedule: the scales.
        choose: called with (scale, features so far), returns the scale's token ids and their codes as a map of
            (b, d, s_k, s_k). Encoding searches them, decoding looks them up, sampling draws them.
        phi: called with (scale, upsampled codes).

    Yields:
        One `Scale` per scale, coarse to fine.
    """
    features = start
    for index in range(schedule.num_scales):
        token_ids, codes = choose(index, features)
        features = features + phi(index, bicubic_upsample(codes, schedule.grid))
        yield Scale(index, token_ids, features)


def next_scale_input(features: LatentMap, schedule: ScaleSchedule, scale: int) -> Float[Tensor, "b l d"]:
    """What the transformer reads at `scale` >= 1: the features so far, averaged to its side, one row per token."""
    return area_downsample(features, schedule.sizes[scale]).flatten(2).transpose(1, 2)


def tokens_to_map(rows: Float[Tensor, "b l d"]) -> FeatureMap:
    """Rows of a square scale as a map (b, d, s, s)."""
    size = int(rows.shape[1] ** 0.5)
    return rows.transpose(1, 2).unflatten(2, (size, size))
