"""Curves of a table as one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.charts import draw_grid
from isthmus.studies.tables import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """One panel beside the other; a line's bars are 95 % intervals."""
    draw_grid(panels, _draw, path)


def _draw(axis: "Axes", panel: Panel) -> None:
    for line in panel.lines:
        bars = list(line.half_widths) or None
        axis.errorbar(line.x, line.y, yerr=bars, label=line.name, marker="o", markersize=3, capsize=2)
    if panel.level is not None:
        name, value = panel.level
        axis.axhline(value, color="tab:green", linestyle="--", label=name)
    axis.set_xlabel(panel.along)
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
