"""Masks as people give them: pictures, arrays or tensors, white (1) where pixels are to be made."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from isthmus.errors import UserError
from isthmus.rgb import upright_rgb

logger = logging.getLogger("isthmus")

MaskInput = (
    PIL.Image.Image
    | Shaped[np.ndarray, "*dims"]
    | Shaped[Tensor, "*dims"]
    | Sequence[PIL.Image.Image | Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."]]
)
"""A picture, an array or tensor (h, w), (b, h, w) or (b, 1, h, w), or several of these. White is to be made."""

_WHITES = (1, 255, 65535)
_Plane = Float[Tensor, "1 1 h w"]


def to_masks(masks: object) -> list[_Plane]:
    """One (1, 1, h, w) mask of zeros and ones per image, on the CPU; 1 = unknown.

    Args:
        masks: as `MaskInput` says; anything else is refused in words. Values lie in 0..1, 0..255 or 0..65535, the
            smallest of these that holds them, and what is above one half is white: soft edges and the traces of JPEG
            are said and cut there. Pictures of any mode are read as grey, as images are: upright by their EXIF tag,
            transparency on white, which is made.

    Raises:
        UserError: there is no mask, it is of another kind or shape, has other values, or is empty or full.
    """
    if isinstance(masks, (PIL.Image.Image, np.ndarray, Tensor)) or not isinstance(masks, Iterable):
        masks = [masks]
    planes = [plane for one in masks for plane in _planes(one)]
    if not planes:
        raise UserError("at least one mask is needed, got an empty list. Pass a picture, white where pixels are made.")
    return [_binary(plane) for plane in planes]


def _planes(mask: object) -> list[Shaped[Tensor, "_ _"]]:
    """The planes of one picture, array or tensor."""
    if isinstance(mask, PIL.Image.Image):
        return [torch.from_numpy(np.array(upright_rgb(mask).convert("L")))]
    if not isinstance(mask, (np.ndarray, Tensor)):
        raise UserError(
            f"masks are PIL pictures, arrays or tensors, one or several, got {type(mask).__name__}. Open a file with "
            "PIL.Image.open, make an array of lists with numpy.array."
        )
    if isinstance(mask, np.ndarray) and mask.dtype.kind not in "biuf":
        raise UserError(f"a mask of an array holds numbers or booleans, got {mask.dtype}. Convert it first.")
    values = mask if isinstance(mask, Tensor) else torch.tensor(mask)
    if values.ndim == 4 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim == 2:
        values = values.unsqueeze(0)
    if values.ndim != 3 or not values.numel() or values.is_complex():
        raise UserError(f"a mask is (h, w), and several are (b, h, w) or (b, 1, h, w), got {tuple(values.shape)}.")
    return list(values.detach().cpu())


def _binary(plane: Shaped[Tensor, "h w"]) -> _Plane:
    values = plane.double()
    low, high = values.min().item(), values.max().item()
    white = next((white for white in _WHITES if high <= white), None)
    if white is None or not low >= 0:  # NaN is neither
        raise UserError(
            f"a mask has values in 0..1, 0..255 or 0..65535, black to white, got {low:g}..{high:g}. Scale it first."
        )
    white_places = values > white / 2
    levels = white_places.unique().tolist()
    if len(levels) == 1:
        what, advice = ("full", "Leave some") if levels[0] else ("empty", "Mark some")
        raise UserError(
            f"a mask must have both known (black) and unknown (white, above one half) pixels, got one that is {what}. "
            f"{advice} pixels."
        )
    grey = int(((values > 0) & (values < white)).sum())
    if grey:
        logger.warning(
            "a mask is black and white, this one has %d grey pixels of %d: what is above one half (%g) is made",
            grey, values.numel(), white / 2,
        )  # fmt: skip
    return white_places.float()[None, None]
