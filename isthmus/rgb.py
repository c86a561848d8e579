"""Any picture as 8-bit RGB: one reader, whatever door a picture comes through (a file, a data set, a PIL object)."""

import struct
import zlib

import numpy as np
from jaxtyping import Shaped
from PIL import Image, ImageOps

from isthmus.errors import UserError

MAX_ASPECT = 100
"""How many times as long as it is wide a picture may be."""

# what Pillow raises for broken or foreign files, whichever part of one it comes to first
FAILURES = (
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
_ORIENTATION = 0x0112
_DEEP = 65535
# pixels that are laid on white at once: the whole of a large picture would be held three times
_BAND = 2**20
# longer strips are cut before they are scaled
_WHOLE_ASPECT = 16


def upright_rgb(picture: Image.Image) -> Image.Image:
    """A picture as RGB: its first frame, upright by its EXIF tag, transparency on white.

    Grey is repeated over the channels; 16-bit grey is scaled from 65535 = white, float grey from 1 = white. CMYK and
    palettes are converted, colour profiles are not applied. Raises UserError where it cannot be read, is too long a
    strip, or has grey values beyond white.
    """
    check_shape(*picture.size)
    try:
        upright = _upright(picture)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
            return _deep_grey(np.asarray(upright))
        return _on_white(upright) if upright.has_transparency_data else upright.convert("RGB")
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(f"the picture cannot be read ({failure_words(error)}). Open another file.") from error


def check_shape(width: int, height: int) -> None:
    """Raise UserError for a picture without pixels, or for a strip that is longer than `MAX_ASPECT` allows."""
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"a picture may be {MAX_ASPECT} times as long as it is wide, got {width} x {height} pixels. Crop it first."
        )


def scaled_crop(rgb: Image.Image, size: tuple[int, int], left: int, top: int, side: int) -> Image.Image:
    """The square (left, top, side) of an RGB picture scaled to `size` with antialiasing.

    A long strip is cut before it is scaled, which gives the same pixels up to rounding and does not take the memory of
    a whole strip that is as wide as the square.
    """
    box = (left, top, left + side, top + side)
    if rgb.size == size:
        return rgb.crop(box)
    if max(size) <= _WHOLE_ASPECT * min(size):
        # Pillow widens its filter when it shrinks: this is the antialiasing
        return rgb.resize(size, Image.Resampling.LANCZOS).crop(box)
    across, down = rgb.width / size[0], rgb.height / size[1]
    edges = (left * across, top * down, min(box[2] * across, rgb.width), min(box[3] * down, rgb.height))
    return rgb.resize((side, side), Image.Resampling.LANCZOS, box=edges)


def centre_square(rgb: Image.Image, side: int) -> Image.Image:
    """An RGB picture with its shorter side scaled to `side`, and of that the central square."""
    width, height = shorter_side_to(*rgb.size, side)
    return scaled_crop(rgb, (width, height), (width - side) // 2, (height - side) // 2, side)


def shorter_side_to(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height once the shorter one is `side`."""
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))


def failure_words(error: BaseException) -> str:
    """An error of Pillow's in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _upright(picture: Image.Image) -> Image.Image:
    try:
        # asked for first: Pillow copies pictures that are upright already
        return ImageOps.exif_transpose(picture) if picture.getexif().get(_ORIENTATION, 1) != 1 else picture
    except FAILURES:  # a damaged tag says nothing about the pixels
        return picture


def _on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGB", picture.size)
    rows = max(1, _BAND // picture.width)
    for top in range(0, picture.height, rows):
        band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        if band.mode in ("La", "RGBa"):
            band = band.convert({"La": "LA", "RGBa": "RGBA"}[band.mode])
        layer = band.convert("RGBA")
        white.paste(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"), (0, top))
    return white


def _deep_grey(values: Shaped[np.ndarray, "h w"]) -> Image.Image:
    is_float = values.dtype.kind == "f"
    white = 1 if is_float else _DEEP
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= white):
        raise UserError(
            f"grey values from {low} to {high} lie outside 0..{white}, where {white} is white. Scale the picture first."
        )
    if is_float:
        grey = np.rint(values.astype(np.float64) * 255.0).astype(np.uint8)
    else:
        grey = np.rint(np.arange(_DEEP + 1) * (255.0 / _DEEP)).astype(np.uint8)[values]
    return Image.fromarray(grey).convert("RGB")
