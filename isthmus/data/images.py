"""From the bytes of an image file to a square training view: decode, resize, crop, shift, flip."""

import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from isthmus.errors import UserError
from isthmus.rgb import FAILURES, centre_square, check_shape, failure_words, scaled_crop, shorter_side_to, upright_rgb

ImageUint8 = UInt8[np.ndarray, "h w 3"]
"""One sRGB image, 0..255."""

MAX_PIXELS = 2**26  # 8192 x 8192; below Pillow's own limit, so that its warning never fires for what we accept

# formats that cameras and browsers write, by how their files begin (those of a box: behind its length)
_FOREIGN = {
    "HEIC": tuple(b"ftyp" + brand for brand in b"heic heix heim heis hevc hevx mif1 msf1".split()),
    "AVIF": (b"ftypavif", b"ftypavis"),
    "JPEG XL": (b"\xff\x0a", b"JXL "),
    "SVG": (b"<svg",),
    "a Photoshop file": (b"8BPS",),
    "OpenEXR": (b"v/1\x01",),
}


class UnreadableImage(UserError):
    """An image that cannot be used; the message is the reason."""


def decode_image(data: bytes) -> ImageUint8:
    """The image in these bytes as uint8 RGB, as `upright_rgb` makes it of any picture.

    Raises UnreadableImage for broken, truncated or foreign bytes, and, from the header alone, for images of more than
    `MAX_PIXELS` pixels and for strips that are too long.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
            check_shape(width, height)
            image.load()
            return np.ascontiguousarray(np.asarray(upright_rgb(image)))
    except UnreadableImage:
        raise
    except UserError as error:
        raise UnreadableImage(str(error).removesuffix(".")) from error
    except FAILURES as error:
        raise UnreadableImage(_reason(error, data)) from error


def rendered_svg(svg: str, image_size: int) -> ImageUint8:
    """A drawing on a white square of side `image_size`, the same on every machine: no fonts of the system are asked.

    Raises ImportError without the extra `demo`.
    """
    import resvg_py

    size = {"width": image_size, "height": image_size, "background": "#ffffff", "skip_system_fonts": True}
    return decode_image(resvg_py.svg_to_bytes(svg_string=svg, **size))


def _reason(error: BaseException, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        head = data[4:12] if data[4:8] in (b"ftyp", b"JXL ") else data[:12]
        kind = next((kind for kind, starts in _FOREIGN.items() if head.startswith(starts)), None)
        if kind is not None:
            return f"{kind}, which Pillow does not read: convert it to PNG or JPEG"
        return "not an image Pillow can read"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more pixels than the limit of {MAX_PIXELS}"
    return failure_words(error)


SquareView = UInt8[np.ndarray, "side side 3"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random views of an image. The defaults are VAR's (resize to 1.125 times the size, random crop), with flips."""

    resize_ratio: float = 1.125
    """The shorter side is resized to round(resize_ratio * image_size) before a random crop of image_size."""

    flip: bool = True
    """Mirror half of the views, for the classes whose meaning survives it (ImageSource.flip)."""

    max_shift: float = 0.0
    """Largest shift along each axis, as a fraction of the image size; the border pixels are repeated."""

    def __post_init__(self) -> None:
        if not 1 <= self.resize_ratio <= 8:
            raise UserError(f"resize_ratio must lie in [1, 8], got {self.resize_ratio}. 1 leaves no room for crops.")
        if not 0 <= self.max_shift <= 0.5:
            raise UserError(f"max_shift is a fraction of the image size in [0, 0.5], got {self.max_shift}.")


def augmented_view(
    image: ImageUint8, image_size: int, augmentation: Augmentation, generator: np.random.Generator, *, may_flip: bool
) -> SquareView:
    """One random view of side `image_size`. Draws five numbers, whatever the settings."""
    crop_y, crop_x, shift_y, shift_x, coin = generator.random(5)
    size = shorter_side_to(image.shape[1], image.shape[0], round(augmentation.resize_ratio * image_size))
    left, top = (int(share * (side - image_size + 1)) for share, side in zip((crop_x, crop_y), size, strict=True))
    view = np.array(scaled_crop(Image.fromarray(image), size, left, top, image_size))
    limit = round(augmentation.max_shift * image_size)
    if limit:
        padded = np.pad(view, ((limit, limit), (limit, limit), (0, 0)), mode="edge")
        top, left = (2 * limit - int(share * (2 * limit + 1)) for share in (shift_y, shift_x))
        view = padded[top : top + image_size, left : left + image_size]
    if augmentation.flip and may_flip and coin < 0.5:
        view = view[:, ::-1]
    return np.ascontiguousarray(view)


def centre_view(image: ImageUint8, image_size: int) -> SquareView:
    """The view for evaluation: shorter side resized with antialiasing, then the central square."""
    return np.array(centre_square(Image.fromarray(image), image_size))
