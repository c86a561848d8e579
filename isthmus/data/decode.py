"""Any image file to uint8 RGB: the odd ones come out right, the broken ones are refused in words."""

import io
import struct
import zlib

import numpy as np
from jaxtyping import Float, Int, UInt, UInt8
from PIL import Image, ImageOps

from isthmus.errors import UserError

ImageUint8 = UInt8[np.ndarray, "h w 3"]
"""One sRGB image, 0..255."""

MAX_PIXELS = 2**26  # 8192 x 8192; below Pillow's own limit, so that its warning never fires for what we accept

# what Pillow's decoders raise for broken or foreign bytes; all of it becomes UnreadableImage
_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # where the caller turns warnings into errors
)


class UnreadableImage(UserError):
    """An image that cannot be used; the message is the reason."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageUint8:
    """The image in these bytes as uint8 RGB: the first frame, upright by its EXIF tag, alpha composited on white.

    Grey is repeated over the channels, 16-bit grey is scaled to 8 bits, CMYK and palettes are converted. Embedded
    colour profiles are not applied. Raises UnreadableImage for broken, truncated or foreign bytes, and, from the header
    alone, for images of more than `max_pixels` pixels.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(f"{width} x {height} pixels are more than the limit of {max_pixels}")
            image.load()
            return np.ascontiguousarray(np.asarray(_to_rgb(_upright(image))))
    except UnreadableImage:
        raise
    except _FAILURES as error:
        raise UnreadableImage(_reason(error, data)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _FAILURES:  # a damaged tag says nothing about the pixels, which were read
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(np.asarray(image))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _deep_grey(values: Int[np.ndarray, "h w"] | Float[np.ndarray, "h w"] | UInt[np.ndarray, "h w"]) -> Image.Image:
    """16-bit grey (65535 = white) or float grey (1 = white) to RGB."""
    is_float = values.dtype.kind == "f"
    white = 1.0 if is_float else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise UnreadableImage(f"grey values from {values.min()} to {values.max()} lie outside 0..{white:g}")
    grey = np.rint(values.astype(np.float64) * (255.0 / white)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _reason(error: BaseException, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image Pillow can read"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more pixels than the limit of {MAX_PIXELS}"
    return " ".join(str(error).split()) or type(error).__name__
