"""Curves of a table as one picture."""

from collections.abc import Sequence
from pathlib import Path

from isthmus.data.cache import write_whole
from isthmus.studies.tables import Panel

_COLUMNS = 3


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """One panel beside the other; a line's bars are 95 % intervals."""
    # imported here: matplotlib takes a moment, and tables do without
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        for line in panel.lines:
            bars = list(line.half_widths) or None
            axis.errorbar(line.x, line.y, yerr=bars, label=line.name, marker="o", markersize=3, capsize=2)
        if panel.level is not None:
            name, value = panel.level
            axis.axhline(value, color="tab:green", linestyle="--", label=name)
        axis.set(xlabel=panel.along)
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
