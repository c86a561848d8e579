"""Plots of a report: curves by scale, position or number of tokens, and the guidance sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.data.cache import write_whole
from isthmus.evaluation.protocol import Curve, EvaluationRecord, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES, SWEEP = "curves.png", "sweep.png"
_COLUMNS = 3
_SWEPT = 6  # scores of a sweep that are drawn


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """One panel per curve."""
    # imported here: matplotlib takes a moment, and scores do without
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, curve in zip(panels, curves, strict=False):
        _line(panel, curve.positions, curve.values)
        panel.set(title=curve.name, xlabel=curve.along)
        panel.title.set_fontsize(10)
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_sweep(record: EvaluationRecord, path: Path) -> None:
    """One panel per score: its value against guidance, with the floor as a line."""
    from matplotlib.figure import Figure

    names = [score.name for score in next(iter(record.sweep.values()))][:_SWEPT]
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        found: dict[str, Score] = {
            guidance: score for guidance, scores in record.sweep.items() for score in scores if score.name == name
        }
        _line(panel, tuple(found), tuple(score.value for score in found.values()))
        floor = next(iter(found.values())).floor
        if floor is not None:
            panel.axhline(floor, color="tab:green", linestyle="--", label="real images")
            panel.legend(fontsize=8)
        panel.set(title=name, xlabel="guidance")
        panel.title.set_fontsize(10)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _line(panel: "Axes", positions: Sequence[str], values: Sequence[float]) -> None:
    places = list(range(len(positions)))
    panel.plot(places, values, marker="o", markersize=3)
    shown = places[:: max(1, len(places) // 8)]
    panel.set_xticks(shown, [positions[i] for i in shown], fontsize=8)
    panel.grid(alpha=0.3)
