"""Pictures for people: model output as 8-bit images, tables of images with names on rows and columns, charts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from isthmus.files import write_whole
from isthmus.nn.shapes import Images
from isthmus.rgb import upright_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GAP_PX = 2
_PLAIN_TEXT = 500  # characters of a PNG's text that are written as they are


def to_uint8(images: Images) -> UInt8[np.ndarray, "b h w 3"]:
    """Images in [-1, 1] (NCHW) as 0..255 (NHWC), rounded to the nearest level."""
    scaled = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Images) -> list[Image.Image]:
    """Images in [-1, 1] (NCHW) as PIL images."""
    return [Image.fromarray(image) for image in to_uint8(images)]


def table(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    min_side_px: int = 64,
) -> Image.Image:
    """Images in rows and columns on white, with names at the left and on top where given.

    Serves as a labelled grid (rows = classes) and as a coarse-to-fine strip (columns = scales). Rows may differ in
    length; images of different size are brought to the largest. Images smaller than `min_side_px` are enlarged by a
    whole factor, pixel by pixel.
    """
    width = max(image.width for row in rows for image in row)
    height = max(image.height for row in rows for image in row)
    factor = max(1, -(-min_side_px // max(width, height)))
    cell = (width * factor, height * factor)
    font = ImageFont.load_default(size=max(11, min(24, cell[1] // 5)))
    line = round(font.getbbox("Ay")[3]) + 2 * _GAP_PX
    left = max((round(font.getlength(name)) for name in row_names), default=0)
    left += 3 * _GAP_PX if left else 0
    top = line if column_names else 0
    columns = max(len(row) for row in rows)
    row_height = max(cell[1], line if row_names else 0) + _GAP_PX
    canvas = Image.new("RGB", (left + columns * (cell[0] + _GAP_PX), top + len(rows) * row_height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, name in enumerate(column_names):
        pen.text((left + column * (cell[0] + _GAP_PX) + cell[0] // 2, top // 2), name, "black", font, anchor="mm")
    for index, row in enumerate(rows):
        y = top + index * row_height
        if index < len(row_names):
            pen.text((_GAP_PX, y + cell[1] // 2), row_names[index], "black", font, anchor="lm")
        for column, image in enumerate(row):
            enlarged = image.convert("RGB").resize(cell, Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + column * (cell[0] + _GAP_PX), y))
    return canvas


def heat_map(
    picture: Image.Image, values: Float[np.ndarray, "rows columns"], *, limit: float | None = None
) -> Image.Image:
    """Signed values over a grey version of a picture: red above 0, blue below, strongest at +-`limit`.

    `limit` None is the largest absolute value. The grid has square cells and lies where models read a picture that is
    upright by its EXIF tag: over the largest central part of the grid's shape, the central square for a square grid.
    What lies beside it was not read and stays grey. Values are interpolated bilinearly.
    """
    upright = upright_rgb(picture)
    limit = float(np.abs(values).max()) if limit is None else limit
    strength = np.clip(values / limit if limit > 0 else values, -1, 1).astype(np.float32)
    rows, columns = values.shape
    cell = min(upright.width / columns, upright.height / rows)
    size = (round(columns * cell), round(rows * cell))
    grown = np.zeros((upright.height, upright.width, 1), np.float32)
    left, top = (upright.width - size[0]) // 2, (upright.height - size[1]) // 2
    read = Image.fromarray(strength).resize(size, Image.Resampling.BILINEAR)
    grown[top : top + size[1], left : left + size[0], 0] = np.asarray(read)
    grey = np.asarray(upright.convert("L"), dtype=np.float32)[..., None]
    colour = np.where(grown > 0, np.array([215.0, 25, 28]), np.array([44.0, 105, 176]))
    weight = 0.75 * np.abs(grown)
    return Image.fromarray(((1 - weight) * grey + weight * colour).round().astype(np.uint8))


def spread(count: int, wanted: int) -> list[int]:
    """Evenly spread indices, so that a sorted data set shows more than its first class."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def save_picture(picture: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> Path:
    """Write a PNG with `text` in its metadata, whole or not at all; makes the folder where it is missing.

    A long text, such as the numbers of a thousand classes, is compressed; PIL reads both alike (`Image.info`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = PngInfo()
    for key, value in (text or {}).items():
        metadata.add_text(key, value, zip=len(value) > _PLAIN_TEXT)
    # level 1 takes 8 ms for a photograph of 256 px, the usual 6 takes 23 ms and saves a tenth of the bytes
    write_whole(path, lambda file: picture.save(file, "PNG", pnginfo=metadata, compress_level=1), flush=False)
    return path


Content = TypeVar("Content")

_COLUMNS = 3
_PANEL_INCHES = (4.4, 3.3)


def draw_grid(contents: Sequence[Content], draw: "Callable[[Axes, Content], object]", path: Path) -> None:
    """One panel per content, at most three side by side, as a PNG file that appears whole or not at all."""
    # imported here: matplotlib takes a moment, and numbers do without
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(contents))
    rows = -(-len(contents) // columns)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, content in zip(axes[: len(contents)], contents, strict=True):
        draw(axis, content)
    for axis in axes[len(contents) :]:
        axis.set_axis_off()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
