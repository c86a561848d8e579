"""Any image file to uint8 RGB: the odd ones come out right, the broken ones are refused in words."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from isthmus.errors import UserError
from isthmus.rgb import FAILURES, check_shape, failure_words, upright_rgb

ImageUint8 = UInt8[np.ndarray, "h w 3"]
"""One sRGB image, 0..255."""

MAX_PIXELS = 2**26  # 8192 x 8192; below Pillow's own limit, so that its warning never fires for what we accept


# formats that cameras and browsers write, by how their files begin
_FOREIGN = {
    "HEIC": tuple(
        b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    ),
    "AVIF": (b"ftypavif", b"ftypavis"),
    "JPEG XL": (b"\xff\x0a", b"JXL "),
    "SVG": (b"<svg",),
    "a Photoshop file": (b"8BPS",),
    "OpenEXR": (b"v/1\x01",),
}


class UnreadableImage(UserError):
    """An image that cannot be used; the message is the reason."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageUint8:
    """The image in these bytes as uint8 RGB, as `upright_rgb` makes it of any picture.

    Raises UnreadableImage for broken, truncated or foreign bytes, and, from the header alone, for images of more than
    `max_pixels` pixels and for strips that are too long.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImage(f"{width} x {height} pixels are more than the limit of {max_pixels}")
            check_shape(width, height)
            image.load()
            return np.ascontiguousarray(np.asarray(upright_rgb(image)))
    except UnreadableImage:
        raise
    except UserError as error:
        raise UnreadableImage(str(error).removesuffix(".")) from error
    except FAILURES as error:
        raise UnreadableImage(_reason(error, data)) from error


def _head(data: bytes) -> bytes:
    """The first bytes that tell formats apart: those of a box lie behind its length."""
    return data[4:12] if data[4:8] in (b"ftyp", b"JXL ") else data[:12]


def _reason(error: BaseException, data: bytes) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        kind = next((kind for kind, starts in _FOREIGN.items() if _head(data).startswith(starts)), None)
        if kind is not None:
            return f"{kind}, which Pillow does not read: convert it to PNG or JPEG"
        return "not an image Pillow can read"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more pixels than the limit of {MAX_PIXELS}"
    return failure_words(error)
