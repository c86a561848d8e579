"""Grids of matplotlib panels, written whole."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from isthmus.data.cache import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
