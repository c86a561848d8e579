"""Pictures of any size on the square that a model makes, with a mask of what is unknown there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.masks import Mask, fill_unknown, paste_known
from isthmus.functional.shapes import Images
from isthmus.generation.step import Pictures
from isthmus.pictures import to_pil
from isthmus.pipelines.images import ImageInput, check_size, checked_images, from_pictures, listed_images
from isthmus.pipelines.request import OutputType, as_output
from isthmus.rgb import upright_rgb

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are the first beyond."""


@dataclass(frozen=True)
class Canvas:
    """Pictures on squares of one size, with masks of what is unknown.

    A picture is scaled so that its longer side is the square's, and centred; the border beside a shorter side is
    unknown.

    Attributes:
        pixels: (b, 3, side, side) in [-1, 1].
        mask: (b, 1, side, side), 1 = unknown, the border included.
        hole: (b, 1, side, side), the same without the border: what is unknown of the pictures themselves.
        boxes: where the picture lies, one per image.
    """

    pixels: Images
    mask: Mask
    hole: Mask
    boxes: list[Box]

    def pasted(self, images: Images, seam_px: int) -> Images:
        """The known pixels over images that were made; a single canvas serves all of them.

        The seam lies beside the holes alone. It does not start from the border, which is cut off: known pixels far
        from any hole stay as they are.
        """
        return paste_known(images, self.pixels, self.hole, seam_px=seam_px)

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
    """Every image at its own size, in [-1, 1], on the CPU.

    Raises:
        UserError: there is no image, it is neither picture nor tensor, or a tensor is none of images in [-1, 1].
    """
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
    """Pictures and their masks on squares of `side` pixels.

    Args:
        images: each (1, 3, h, w).
        masks: one per image, of its size; zeros alone where all is known.
        side: that of the model's images.
        stride: pixels per latent cell, the smallest picture that says anything.
        hide: what lies under the mask is painted over from around, before scaling, so that nothing of it is read. The
            border always is.

    Images and masks lie on one device, and so does the canvas.

    Raises:
        UserError: a mask has another size than its image, a picture is smaller than the stride, or scaling leaves
            nothing known.
    """
    placed = [_place(image, mask, side, stride, hide) for image, mask in zip(images, masks, strict=True)]
    return Canvas(
        torch.cat([one.pixels for one in placed]),
        torch.cat([one.mask for one in placed]),
        torch.cat([one.hole for one in placed]),
        [box for one in placed for box in one.boxes],
    )


def _place(
    image: Float[Tensor, "1 3 _ _"], mask: Float[Tensor, "1 1 _ _"], side: int, stride: int, hide: bool
) -> Canvas:
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
    unknown, border = F.pad(mask, around, value=1.0), F.pad(torch.zeros_like(mask), around, value=1.0)
    pixels = F.pad(image, around)
    if any(around):
        pixels = fill_unknown(pixels, border)
    return Canvas(pixels, unknown, F.pad(mask, around), [(left, top, left + size[1], top + size[0])])


def extended(
    image: Float[Tensor, "1 3 h w"], stride: int, left: int, top: int, right: int, bottom: int
) -> tuple[Float[Tensor, "1 3 _ _"], Float[Tensor, "1 1 _ _"]]:
    """A picture with unknown margins of so many pixels, and the mask of these, on its device.

    The margins are painted from the picture: there is nothing of an original under them that a rule of keeping could
    read, and what is encoded should not be a grey frame.

    Raises:
        UserError: the picture is smaller than the stride, a margin is negative, or all are 0.
    """
    check_size(image.shape[-1], image.shape[-2], stride)
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(margins.values()) < 0 or not any(margins.values()):
        raise UserError(f"outpainting needs margins in pixels, none negative and one above 0, got {margins}.")
    around = (left, right, top, bottom)
    mask = F.pad(torch.zeros_like(image[:, :1]), around, value=1.0)
    return fill_unknown(F.pad(image, around), mask), mask
