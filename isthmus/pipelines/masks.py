"""Masks as people give them: pictures, arrays or tensors, white (1) where pixels are to be made."""

from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from isthmus.errors import UserError
from isthmus.pipelines.images import upright_rgb

MaskInput = (
    PIL.Image.Image
    | Shaped[np.ndarray, "*dims"]
    | Shaped[Tensor, "*dims"]
    | Sequence[PIL.Image.Image | Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."]]
)
"""A picture, an array or tensor (h, w), (b, h, w) or (b, 1, h, w), or several of these. White is to be made."""

_Plane = Float[Tensor, "1 1 h w"]


def to_masks(masks: object) -> list[_Plane]:
    """One (1, 1, h, w) mask of zeros and ones per image, on the CPU; 1 = unknown.

    Args:
        masks: as `MaskInput` says; anything else is refused in words. Values are false and true, 0 and 1, or 0 and
            255, of any type. Pictures of any mode are read as grey, as images are: upright by their EXIF tag,
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
    if values.ndim != 3 or not values.numel():
        raise UserError(f"a mask is (h, w), and several are (b, h, w) or (b, 1, h, w), got {tuple(values.shape)}.")
    return list(values.detach().cpu())


def _binary(plane: Shaped[Tensor, "h w"]) -> _Plane:
    found = plane.unique()
    levels = found.tolist()
    if not (set(levels) <= {0, 1} or set(levels) <= {0, 255}):
        shown = ", ".join(f"{level:g}" for level in levels[:6]) + (", ..." if len(levels) > 6 else "")
        raise UserError(
            f"a mask must be black and white (0 and 1, or 0 and 255), got the values {shown}. Threshold it first, for "
            "example mask.point(lambda grey: 255 * (grey > 127))."
        )
    if len(levels) == 1:
        what, advice = ("full", "Leave some") if levels[0] else ("empty", "Mark some")
        raise UserError(
            f"a mask must have both known (black) and unknown (white) pixels, got one that is {what}. {advice} pixels."
        )
    return (plane > 0).float()[None, None]
