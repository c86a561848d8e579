"""Images as people give them to a pipeline: PIL pictures or tensors, one or several."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.shapes import Images

ImageInput = PIL.Image.Image | Sequence[PIL.Image.Image] | Tensor
"""A PIL picture, several of them, or a tensor (b, 3, h, w) or (3, h, w) in [-1, 1]."""

_SLACK = 1e-3  # beyond [-1, 1]: rounding of whoever made the tensor


def to_images(images: ImageInput, image_size: int) -> Images:
    """Images in [-1, 1], fp32, on the CPU.

    Pictures become RGB (upright by their EXIF tag, transparency on white), their shorter side is resized to
    `image_size` with antialiasing, and the central square is kept, as images for evaluation are. Tensors keep their
    size.

    Raises:
        UserError: there is no image, or a tensor has another shape, is not finite, or leaves [-1, 1].
    """
    if isinstance(images, Tensor):
        return checked_images(images)
    pictures = [images] if isinstance(images, PIL.Image.Image) else list(images)
    if not pictures:
        raise UserError("at least one image is needed, got an empty list. Pass a picture or a tensor.")
    return from_pictures([_square(picture, image_size) for picture in pictures])


def checked_images(images: Tensor) -> Images:
    """A tensor of images as (b, 3, h, w), fp32, on the CPU.

    Raises:
        UserError: it has another shape, is not finite, or leaves [-1, 1].
    """
    batch = images.unsqueeze(0) if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel():
        raise UserError(f"images must be a tensor (b, 3, h, w) or (3, h, w), got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise UserError(f"images must be floats in [-1, 1], got {images.dtype}. Divide 0..255 by 127.5, subtract 1.")
    batch = batch.detach().float().cpu()
    if not bool(torch.isfinite(batch).all()):
        raise UserError("images must be finite, got NaN or infinity. Mend the images first.")
    low, high = batch.aminmax()
    if low < -1 - _SLACK or high > 1 + _SLACK:
        raise UserError(
            f"images must lie in [-1, 1], got {low.item():g}..{high.item():g}. Divide 0..255 by 127.5 and subtract 1."
        )
    return batch


def upright_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as RGB of the same size: upright by its EXIF tag, transparency on white."""
    upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        upright = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layered.size, "white"), layered)
    return upright.convert("RGB")


def from_pictures(pictures: Sequence[PIL.Image.Image]) -> Images:
    """RGB pictures of one size as a tensor in [-1, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _square(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    rgb = upright_rgb(picture)
    width, height = rgb.size
    scale = side / min(width, height)
    if scale != 1:
        size = (max(side, round(width * scale)), max(side, round(height * scale)))
        rgb = rgb.resize(size, PIL.Image.Resampling.LANCZOS)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    return rgb.crop((left, top, left + side, top + side))
