"""Masks of pixels, and what they say about tokens: which are kept, which are drawn, how the seam is blended.

A mask is 1 where pixels are unknown (to be made, white in a picture of the mask) and 0 where they are known.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from isthmus.functional.shapes import Images

Mask = Float[Tensor, "b 1 h w"]
"""1 = unknown, 0 = known."""
KeptTokens = list[Bool[Tensor, "b _"]]
"""One entry per scale: which of its tokens an edit takes from the source."""


def unknown_share(mask: Mask, side: int) -> Float[Tensor, "b l"]:
    """Share of unknown pixels under every token of a side x side scale, row by row; exactly 0 and 1 at the ends.

    Cells overlap by a pixel where `side` does not divide the mask's, as those of the tokenizer's averages do.
    """
    return F.interpolate(mask, size=(side, side), mode="area").flatten(1)


def kept_by_coverage(mask: Mask, sizes: Sequence[int], largest_share: Sequence[float]) -> KeptTokens:
    """Tokens with at most this share of unknown pixels, one share in [0, 1) per scale.

    So a token whose pixels are all known is kept, and one whose pixels are all unknown is drawn, at any share.

    >>> left_half = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    >>> kept_by_coverage(left_half, (1, 2), (0.5, 0.5))
    [tensor([[True]]), tensor([[False,  True, False,  True]])]
    """
    return [unknown_share(mask, side) <= share for side, share in zip(sizes, largest_share, strict=True)]


def kept_as_published(mask: Mask, sizes: Sequence[int]) -> KeptTokens:
    """VAR's rule (spec of VAR, 2.8): the known cells of the latent grid, resized bilinearly, exceed 1/2; 1 x 1 is kept.

    The mask is first brought to the latent grid, whose side is the last of `sizes`; a cell there is known where at
    least half of its pixels are.
    """
    grid = sizes[-1]
    known = (unknown_share(mask, grid) <= 0.5).float().view(-1, 1, grid, grid)
    resized = [F.interpolate(known, size=(s, s), mode="bilinear", align_corners=False).flatten(1) > 0.5 for s in sizes]
    return [torch.ones_like(kept) if s == 1 else kept for s, kept in zip(sizes, resized, strict=True)]


def fill_unknown(images: Images, mask: Mask) -> Images:
    """Unknown pixels take the colour of the known ones around; what lies under the mask is never read.

    Averages of the known pixels over ever smaller cells (1, 2, 4, ... a side); a cell without a known pixel takes the
    larger ones, interpolated bilinearly. Known pixels stay as they are.
    """
    known, height, width = 1 - mask, *images.shape[-2:]
    # where, not a product: under the mask there may be anything, NaN included
    visible = torch.where(mask > 0, torch.zeros_like(images), images)
    filled, cells = images.new_zeros(*images.shape[:2], 1, 1), 1
    while cells < 2 * max(height, width):
        size = (min(cells, height), min(cells, width))
        weight = F.interpolate(known, size=size, mode="area")
        colour = F.interpolate(visible, size=size, mode="area") / weight.clamp(min=1e-12)
        coarser = F.interpolate(filled, size=size, mode="bilinear", align_corners=False)
        filled, cells = torch.where(weight > 0, colour, coarser), 2 * cells
    return torch.where(mask > 0, filled, images)


def feathered(mask: Mask, seam_px: int) -> Mask:
    """Weight of the new picture: 1 under the mask, falling to 0 over `seam_px` known pixels around it.

    The distance counts diagonal steps as one.

    >>> feathered(torch.tensor([[[[1.0, 0, 0, 0, 0]]]]), seam_px=3).flatten().tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    reached, total = mask, mask
    for _ in range(seam_px):
        reached = F.max_pool2d(reached, kernel_size=3, stride=1, padding=1)
        total = total + reached
    return total / (seam_px + 1)


def paste_known(
    new: Images, source: Float[Tensor, "#b 3 h w"], mask: Float[Tensor, "#b 1 h w"], *, seam_px: int
) -> Images:
    """The known pixels of `source` over `new`, blended over `seam_px` of them beside the mask.

    Under the mask this is `new` exactly, and further than `seam_px` from it `source` exactly. One source and mask
    serve any number of new pictures.
    """
    return torch.lerp(source, new, feathered(mask, seam_px))


def project_onto_small(images: Images, small: Float[Tensor, "b 3 small_h small_w"], *, steps: int = 12) -> Images:
    """Images in [-1, 1] whose averages over the cells of `small` are those of `small`, up to clamping.

    Each step adds the difference, enlarged bicubically (Irani and Peleg, "Improving resolution by image
    registration", iterative back-projection).
    """
    height, width = images.shape[-2:]
    for _ in range(steps):
        missing = small - F.interpolate(images, size=small.shape[-2:], mode="area")
        images = images + F.interpolate(missing, size=(height, width), mode="bicubic", align_corners=False)
        images = images.clamp(-1, 1)
    return images
