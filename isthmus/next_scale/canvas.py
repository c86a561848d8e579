"""Masks and canvases of edits: pictures of any size on the model's square, and what a mask says about tokens.

A mask is 1 where pixels are unknown (to be made, white in a picture of the mask) and 0 where they are known.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from isthmus.errors import UserError
from isthmus.nn.shapes import Images
from isthmus.pictures import to_pil
from isthmus.pipelines.images import ImageInput, check_size, checked_images, from_pictures, listed_images
from isthmus.pipelines.request import OutputType, Pictures, as_output
from isthmus.rgb import upright_rgb

logger = logging.getLogger("isthmus")

MaskInput = (
    PIL.Image.Image
    | Shaped[np.ndarray, "*dims"]
    | Shaped[Tensor, "*dims"]
    | Sequence[PIL.Image.Image | Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."]]
)
"""A picture, an array or tensor (h, w), (b, h, w) or (b, 1, h, w), or several of these. White is to be made."""
Mask = Float[Tensor, "b 1 h w"]
"""1 = unknown, 0 = known."""
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are the first beyond."""


def unknown_share(mask: Mask, side: int) -> Float[Tensor, "b l"]:
    """Share of unknown pixels under every token of a side x side scale, row by row; exactly 0 and 1 at the ends."""
    return F.interpolate(mask, size=(side, side), mode="area").flatten(1)


def kept_by_coverage(mask: Mask, sizes: Sequence[int], largest_share: Sequence[float]) -> list[Bool[Tensor, "b _"]]:
    """Tokens with at most this share of unknown pixels, one share in [0, 1) per scale.

    >>> left_half = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    >>> kept_by_coverage(left_half, (1, 2), (0.5, 0.5))
    [tensor([[True]]), tensor([[False,  True, False,  True]])]
    """
    return [unknown_share(mask, side) <= share for side, share in zip(sizes, largest_share, strict=True)]


def kept_as_published(mask: Mask, sizes: Sequence[int]) -> list[Bool[Tensor, "b _"]]:
    """VAR's rule (spec of VAR, 2.8): the known cells of the latent grid, resized bilinearly, exceed 1/2; 1 x 1 is kept.

    A cell of the latent grid, whose side is the last of `sizes`, is known where at least half of its pixels are.
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


def project_onto_small(images: Images, small: Float[Tensor, "b 3 small_h small_w"]) -> Images:
    """Images in [-1, 1] whose averages over the cells of `small` are those of `small`, up to clamping.

    Iterative back-projection: Irani and Peleg, "Improving resolution by image registration".
    """
    height, width = images.shape[-2:]
    for _ in range(12):
        missing = small - F.interpolate(images, size=small.shape[-2:], mode="area")
        images = images + F.interpolate(missing, size=(height, width), mode="bicubic", align_corners=False)
        images = images.clamp(-1, 1)
    return images


def to_masks(masks: object) -> list[Float[Tensor, "1 1 h w"]]:
    """One (1, 1, h, w) mask of zeros and ones per image, on the CPU; 1 = unknown.

    Values lie in 0..1, 0..255 or 0..65535, the smallest of these that holds them, and what is above one half is white.
    Pictures of any mode are read as grey: upright by their EXIF tag, transparency on white, which is made. Raises
    UserError for anything that `MaskInput` does not name, and for a mask that is empty or full.
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


def _binary(plane: Shaped[Tensor, "h w"]) -> Float[Tensor, "1 1 h w"]:
    values = plane.double()
    low, high = values.min().item(), values.max().item()
    white = next((white for white in (1, 255, 65535) if high <= white), None)
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


@dataclass(frozen=True)
class Canvas:
    """Pictures on squares of one size, scaled so that the longer side is the square's, and centred.

    `mask` (1 = unknown) includes the border beside a shorter side, `hole` is the same without it; `boxes` say where
    each picture lies.
    """

    pixels: Images
    mask: Mask
    hole: Mask
    boxes: list[Box]

    def pasted(self, images: Images, seam_px: int) -> Images:
        """The known pixels over images that were made, blended over `seam_px` of them; a single canvas serves all.

        Under the hole this is `images` exactly, and further than `seam_px` from it the known pixels exactly. The seam
        does not start from the border, which is cut off.
        """
        return torch.lerp(self.pixels, images, feathered(self.hole, seam_px))

    def cut(self, images: Images, output_type: OutputType) -> Pictures:
        """The pictures without the border, in the form asked for."""
        if len(set(self.boxes)) == 1:
            left, top, right, bottom = self.boxes[0]
            return as_output(images[..., top:bottom, left:right], output_type)
        assert output_type == "pil", "checked before anything is drawn"
        cuts = zip(images.split(1), self.boxes, strict=True)
        return [to_pil(one[..., top:bottom, left:right])[0] for one, (left, top, right, bottom) in cuts]

    def check_output_type(self, output_type: OutputType) -> None:
        """Raise UserError where pictures of several shapes are asked for as one array."""
        if output_type in ("np", "pt") and len(set(self.boxes)) > 1:
            raise UserError(
                f"pictures of several shapes do not fit into one array, got output_type={output_type!r}. Pass "
                'output_type="pil", or pictures of one shape.'
            )


def open_images(images: ImageInput) -> list[Float[Tensor, "1 3 h w"]]:
    """Every image at its own size, in [-1, 1], on the CPU; UserError where there is none, or something else."""
    opened: list[Tensor] = []
    for one in listed_images(images):
        batch = checked_images(one) if isinstance(one, Tensor) else from_pictures([upright_rgb(one)])
        opened += batch.split(1)
    return opened


def place(
    images: Sequence[Float[Tensor, "1 3 _ _"]],
    masks: Sequence[Float[Tensor, "1 1 _ _"]],
    side: int,
    *,
    stride: int,
    hide: bool = True,
) -> Canvas:
    """Pictures and their masks (1 = unknown) on squares of `side` pixels, on the device of both.

    With `hide`, what lies under the mask is painted over from around, before scaling, so that nothing of it is read;
    the border always is. Raises UserError where a mask has another size than its image, a picture is smaller than
    `stride` (pixels per latent cell), or scaling leaves nothing known.
    """
    placed = [_place(image, mask, side, stride, hide) for image, mask in zip(images, masks, strict=True)]
    pixels, unknown, holes, boxes = zip(*placed, strict=True)
    return Canvas(torch.cat(pixels), torch.cat(unknown), torch.cat(holes), list(boxes))


def _place(
    image: Float[Tensor, "1 3 _ _"], mask: Float[Tensor, "1 1 _ _"], side: int, stride: int, hide: bool
) -> tuple[Tensor, Tensor, Tensor, Box]:
    height, width = image.shape[-2:]
    if mask.shape[-2:] != image.shape[-2:]:
        raise UserError(
            f"a mask must have the size of its image, {width} x {height} pixels, got {mask.shape[-1]} x "
            f"{mask.shape[-2]}. Resize the mask, or draw it on the image."
        )
    check_size(width, height, stride)
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if hide and bool(mask.any()):
        image = fill_unknown(image, mask)
    if size != (height, width):
        image = F.interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        # a pixel that mixes known and unknown ones is unknown
        mask = (F.interpolate(mask, size=size, mode="area") > 0).float()
    if bool(mask.all()):
        raise UserError(f"the mask leaves no known pixel at the model's size, {side} x {side}. Make it coarser.")
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    around = (left, side - size[1] - left, top, side - size[0] - top)
    pixels = F.pad(image, around)
    if any(around):
        pixels = fill_unknown(pixels, F.pad(torch.zeros_like(mask), around, value=1.0))
    box = (left, top, left + size[1], top + size[0])
    return pixels, F.pad(mask, around, value=1.0), F.pad(mask, around), box


def extended(
    image: Float[Tensor, "1 3 h w"], stride: int, left: int, top: int, right: int, bottom: int
) -> tuple[Float[Tensor, "1 3 _ _"], Float[Tensor, "1 1 _ _"]]:
    """A picture with unknown margins of so many pixels, painted from it, and the mask of these, on its device.

    Raises UserError where the picture is smaller than the stride, a margin is negative, or all are 0.
    """
    check_size(image.shape[-1], image.shape[-2], stride)
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(margins.values()) < 0 or not any(margins.values()):
        raise UserError(f"outpainting needs margins in pixels, none negative and one above 0, got {margins}.")
    around = (left, right, top, bottom)
    mask = F.pad(torch.zeros_like(image[:, :1]), around, value=1.0)
    return fill_unknown(F.pad(image, around), mask), mask
