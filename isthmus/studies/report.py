"""report.md and report.html of a study: every table, the papers' claims beside it, and what was not run."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.data.cache import write_whole
from isthmus.evaluation.report_blocks import Block, Heading, Paragraph, Picture, Table, markdown, one_html_file
from isthmus.studies.plots import draw_panels
from isthmus.studies.readings import RULE, Difference
from isthmus.studies.tables import Finding, StudyTable, TableSpec, number

logger = logging.getLogger("isthmus")

_CLAIM_HEAD = ("claim of a paper", "source", "measured here", "verdict")


def write_study_report(
    folder: Path,
    *,
    title: str,
    summary: Sequence[str],
    specs: Sequence[TableSpec[Any]],
    tables: Mapping[str, StudyTable],
    facts: Mapping[str, Any],
) -> Path:
    """Write both reports, and a picture per table with curves where matplotlib is installed; returns report.md.

    Args:
        folder: of the study.
        title: of the report.
        summary: its first paragraphs.
        specs: all tables of the study; those that are not in `tables` are marked "not run".
        tables: finished tables by name.
        facts: what made the numbers.
    """
    for name, table in tables.items():
        if table.panels:
            _draw(table, folder / f"{name}.png")
    blocks = list(_blocks(folder, title, summary, specs, tables, facts))
    text, page = markdown(blocks), one_html_file(blocks, title=title)
    write_whole(folder / "report.md", lambda file: file.write(text.encode()))
    write_whole(folder / "report.html", lambda file: file.write(page.encode()))
    return folder / "report.md"


def difference_text(found: Difference | None) -> str:
    """First minus second, as a cell.

    >>> difference_text(Difference(-0.5, 0.25, 3)), difference_text(None)
    ('-0.5 [-0.75, -0.25] (3 seeds)', 'not measured')
    """
    if found is None:
        return "not measured"
    seeds = "one seed" if found.num_seeds == 1 else f"{found.num_seeds} seeds"
    if found.half_width is None:
        return f"{number(found.value)}, no interval ({seeds})"
    low, high = found.value - found.half_width, found.value + found.half_width
    return f"{number(found.value)} [{number(low)}, {number(high)}] ({seeds})"


def _draw(table: StudyTable, path: Path) -> None:
    try:
        draw_panels(table.panels, path)
    except ImportError:
        logger.warning('The report has no plots: they need matplotlib. Run: pip install "isthmus[eval]"')


def _blocks(
    folder: Path,
    title: str,
    summary: Sequence[str],
    specs: Sequence[TableSpec[Any]],
    tables: Mapping[str, StudyTable],
    facts: Mapping[str, Any],
) -> Iterator[Block]:
    yield Heading(title, level=1)
    yield from map(Paragraph, summary)
    findings = {spec.title: list(tables[spec.name].findings()) for spec in specs if spec.name in tables}
    rows = [(name, *_finding_cells(finding)) for name, found in findings.items() for finding in found]
    if rows:
        yield Heading("Claims")
        yield Table(("table", *_CLAIM_HEAD), rows)
        yield Paragraph(RULE)
    for spec in specs:
        yield Heading(spec.title)
        if spec.name in tables:
            yield from _table_blocks(tables[spec.name], findings[spec.title], folder / f"{spec.name}.png")
        else:
            yield Paragraph(f"Not run. `--tables {spec.name}` or `--budget full` fills this table.")
    yield Heading("What made these numbers")
    yield Table(("what", "value"), [(name, _text(value)) for name, value in facts.items()])


def _table_blocks(table: StudyTable, findings: Sequence[Finding], picture: Path) -> Iterator[Block]:
    yield Paragraph(table.about)
    yield Table(*table.text())
    if findings:
        yield Table(_CLAIM_HEAD, [_finding_cells(finding) for finding in findings])
    if table.panels and picture.is_file():
        yield Picture(picture, "; ".join(panel.title for panel in table.panels))
    yield from map(Paragraph, table.notes)


def _finding_cells(finding: Finding) -> tuple[str, str, str, str]:
    claim = finding.claim
    measured = f"{claim.column}, {claim.first} minus {claim.second}: {difference_text(finding.difference)}"
    return claim.says, claim.source, measured, finding.verdict


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return number(value) if isinstance(value, float) else str(value)
