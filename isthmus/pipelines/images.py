"""Images as people give them to a pipeline: PIL pictures or tensors, one or several."""

from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from isthmus.errors import UserError
from isthmus.nn.shapes import Images
from isthmus.rgb import centre_square, upright_rgb

ImageInput = PIL.Image.Image | Tensor | Sequence[PIL.Image.Image | Tensor]
"""A PIL picture, a tensor (b, 3, h, w) or (3, h, w) in [-1, 1], or several of these."""

_SLACK = 1e-3  # beyond [-1, 1]: rounding of whoever made the tensor


def to_images(images: ImageInput, image_size: int, *, stride: int = 1) -> Images:
    """Images in [-1, 1], fp32, on the CPU.

    Pictures become RGB as `upright_rgb` makes it of any picture, their shorter side is resized to `image_size` with
    antialiasing, and the central square is kept, as images for evaluation are. Tensors keep their size.

    Raises UserError as `listed_images` and `checked_images`, for tensors of several sizes, and for an image smaller
    than `stride`, the pixels per latent cell.
    """
    opened = []
    for one in listed_images(images):
        if isinstance(one, Tensor):
            batch = checked_images(one)
            check_size(batch.shape[-1], batch.shape[-2], stride)
        else:
            check_size(one.width, one.height, stride)
            batch = from_pictures([centre_square(upright_rgb(one), image_size)])
        opened.append(batch)
    sizes = {f"{one.shape[-1]} x {one.shape[-2]}" for one in opened}
    if len(sizes) > 1:
        raise UserError(f"images must have one size, got {', '.join(sorted(sizes))}. Resize the tensors first.")
    return torch.cat(opened)


def listed_images(images: object) -> list[PIL.Image.Image | Tensor]:
    """Pictures and tensors, one or several, as a list; UserError where there is none, or something else."""
    if isinstance(images, (PIL.Image.Image, Tensor)) or not isinstance(images, Iterable):
        images = [images]
    listed = []
    for one in images:
        if not isinstance(one, (PIL.Image.Image, Tensor)):
            raise UserError(
                f"images are PIL pictures or tensors in [-1, 1], one or several, got {type(one).__name__}. Open a file "
                "with PIL.Image.open, make a picture of an array with PIL.Image.fromarray."
            )
        listed.append(one)
    if not listed:
        raise UserError("at least one image is needed, got an empty list. Pass a picture or a tensor.")
    return listed


def check_size(width: int, height: int, stride: int) -> None:
    """Raise UserError for an image smaller than a latent cell, which says nothing."""
    if min(width, height) < stride:
        raise UserError(
            f"an image must be at least {stride} x {stride} pixels (the tokenizer's stride), got {width} x {height}."
        )


def checked_images(images: Tensor) -> Images:
    """A tensor of images as (b, 3, h, w), fp32, on the CPU; UserError for other shapes, types and ranges."""
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


def from_pictures(pictures: Sequence[PIL.Image.Image]) -> Images:
    """RGB pictures of one size as a tensor in [-1, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
