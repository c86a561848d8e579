"""Plots of a report: curves by scale, position or number of tokens, and the guidance sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.charts import draw_grid
from isthmus.evaluation.protocol import Curve, EvaluationRecord, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES, SWEEP = "curves.png", "sweep.png"
_SWEPT = 6  # scores of a sweep that are drawn


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """One panel per curve."""

    def draw(panel: "Axes", curve: Curve) -> None:
        _line(panel, curve.name, curve.positions, curve.values)
        panel.set_xlabel(curve.along)

    draw_grid(curves, draw, path)


def draw_sweep(record: EvaluationRecord, path: Path) -> None:
    """One panel per score: its value against guidance, with the floor as a line."""

    def draw(panel: "Axes", name: str) -> None:
        found: dict[str, Score] = {
            guidance: score for guidance, scores in record.sweep.items() for score in scores if score.name == name
        }
        _line(panel, name, tuple(found), tuple(score.value for score in found.values()))
        panel.set_xlabel("guidance")
        floor = next(iter(found.values())).floor
        if floor is not None:
            panel.axhline(floor, color="tab:green", linestyle="--", label="real images")
            panel.legend(fontsize=8)

    draw_grid([score.name for score in next(iter(record.sweep.values()))][:_SWEPT], draw, path)


def _line(panel: "Axes", title: str, positions: Sequence[str], values: Sequence[float]) -> None:
    places = list(range(len(positions)))
    panel.plot(places, values, marker="o", markersize=3)
    shown = places[:: max(1, len(places) // 8)]
    panel.set_xticks(shown, [positions[i] for i in shown], fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
