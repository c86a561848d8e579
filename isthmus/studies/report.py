"""report.md and report.html of a study: every table, the papers' claims beside it, and what was not run."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus.evaluation.report import joined, markdown_picture, markdown_table, write_pages
from isthmus.pictures import draw_grid
from isthmus.studies.tables import RULE, Difference, Panel, StudyTable, TableSpec, mean_and_half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("isthmus")

_CLAIM_HEAD = ("claim of a paper", "source", "measured here", "verdict")


def write_study_report(
    folder: Path,
    title: str,
    summary: str,
    specs: Sequence[TableSpec[Any]],
    tables: Mapping[str, StudyTable],
    facts: Mapping[str, Any],
) -> Path:
    """Write both reports, and a picture per table with curves where matplotlib is installed; returns report.md.

    Those of `specs`, all tables of the study, that are not in `tables` are marked "not run"; `facts` made the numbers.
    """
    for spec in specs:
        # of an earlier run, maybe of other results
        (folder / f"{spec.name}.png").unlink(missing_ok=True)
    try:
        for name, table in tables.items():
            if table.panels:
                draw_grid(table.panels, _draw_panel, folder / f"{name}.png")
    except ImportError:
        logger.warning('The report has no plots: they need matplotlib. Run: pip install "isthmus[eval]"')
    text = joined([f"# {title}", summary, *_parts(folder, specs, tables, facts)])
    write_pages(folder, text, title=title)
    return folder / "report.md"


def _draw_panel(axis: "Axes", panel: Panel) -> None:
    for name, points in panel.lines.items():
        means, widths = zip(*map(mean_and_half_width, points.values()), strict=True)
        bars = None if None in widths else widths
        axis.errorbar(list(points), means, yerr=bars, label=name, marker="o", markersize=3, capsize=2)
    if panel.level is not None:
        name, value = panel.level
        axis.axhline(value, color="tab:green", linestyle="--", label=name)
    axis.set_xlabel(panel.along)
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def difference_text(found: Difference, repetitions: str = "seeds") -> str:
    """First minus second, as a cell; `repetitions` are what it is a mean over.

    >>> difference_text(Difference(-0.5, 0.25, 3)), difference_text(Difference(float("nan"), None, 0))
    ('-0.5 [-0.75, -0.25] (3 seeds)', 'not measured')
    """
    if not found.num_seeds:
        return "not measured"
    seeds = f"one {repetitions.removesuffix('s')}" if found.num_seeds == 1 else f"{found.num_seeds} {repetitions}"
    value, half_width = found.value, found.half_width
    if half_width is None:
        return f"{value:.4g}, no interval ({seeds})"
    interval = f" [{value - half_width:.4g}, {value + half_width:.4g}]" if half_width else ""
    return f"{value:.4g}{interval} ({seeds})"


def _parts(
    folder: Path, specs: Sequence[TableSpec[Any]], tables: Mapping[str, StudyTable], facts: Mapping[str, Any]
) -> Iterator[str]:
    claims = {name: list(_claim_cells(table)) for name, table in tables.items()}
    rows = [(spec.title, *cells) for spec in specs for cells in claims.get(spec.name, ())]
    if rows:
        yield "## Claims"
        yield markdown_table(("table", *_CLAIM_HEAD), rows)
        yield RULE
        yield (
            f"{len(rows)} verdicts stand here, each by a 95 % interval of its own: where nothing differs at all, about "
            'one in twenty would still not be "cannot tell". Read a single verdict with that in mind.'
        )
    for spec in specs:
        yield f"## {spec.title}"
        if spec.name not in tables:
            yield f"Not run. `--tables {spec.name}` or `--budget full` fills this table."
            continue
        table, picture = tables[spec.name], folder / f"{spec.name}.png"
        yield table.about
        yield markdown_table(*table.text())
        if claims[spec.name]:
            yield markdown_table(_CLAIM_HEAD, claims[spec.name])
        if table.panels and picture.is_file():
            titles = "; ".join(panel.title for panel in table.panels)
            yield markdown_picture(picture, f"{titles} (bars: 95 % intervals)")
        yield from table.notes
    yield "## What made these numbers"
    yield markdown_table(("what", "value"), [(name, _text(value)) for name, value in facts.items()])


def _claim_cells(table: StudyTable) -> Iterator[tuple[str, str, str, str]]:
    for claim, found in table.findings():
        gap = difference_text(found, table.repetitions(claim.column))
        measured = f"{claim.column}, {claim.first} minus {claim.second}: {gap}"
        yield claim.says, claim.source, measured, found.verdict(claim.direction)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
