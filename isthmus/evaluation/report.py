"""report.md and report.html of an evaluation: every number with what it takes to read it.

A report is written once, as Markdown; the page is made from it.
"""

import base64
import html
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from isthmus.data.cache import write_whole
from isthmus.evaluation.protocol import EvaluationRecord, Score, Subject
from isthmus.evaluation.report_pictures import NEIGHBOURS, SAMPLES
from isthmus.evaluation.report_plots import CURVES, SWEEP, draw_curves, draw_sweep
from isthmus.generation.options import SamplingOptions

logger = logging.getLogger("isthmus")

REPORT_FILES = ("evaluation.json", "report.md", "report.html", SAMPLES, NEIGHBOURS, CURVES, SWEEP)
"""What a report consists of; nothing else is written beside it."""

_MOST_COLUMNS = 40  # of a curve with more positions there is the plot, and the record

HEAD = ("score", "value", "uncertainty", "floor", "ceiling", "images", "better", "note")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
img { max-width: 100%; image-rendering: pixelated; }
code { background: #f3f3f3; padding: 0 .25rem; }
blockquote { border-left: 4px solid #d08000; background: #fff6e5; margin: 1rem 0; padding: .1rem .8rem; }
"""


def write_report(record: EvaluationRecord, out: Path) -> None:
    """Write report.md and report.html from the record and the pictures in `out`; plots where there is matplotlib."""
    for plot in (CURVES, SWEEP):
        # of an earlier scoring, maybe with other curves
        (out / plot).unlink(missing_ok=True)
    try:
        if record.curves:
            draw_curves(record.curves, out / CURVES)
        if record.sweep:
            draw_sweep(record, out / SWEEP)
    except ImportError:
        logger.warning('The report has no plots: they need matplotlib. Run: pip install "isthmus[eval]"')
    write_pages(out, report_text(record, out), title=f"Evaluation of {record.subject.name}")


def write_pages(folder: Path, text: str, *, title: str) -> None:
    """Write report.md, and report.html, which needs nothing else: it opens by a double click, and can be sent.

    Args:
        folder: of the report, with the pictures that the text shows.
        text: the report as Markdown.
        title: of the page.
    """
    page = html_page(text, folder, title=title)
    write_whole(folder / "report.md", lambda file: file.write(text.encode()))
    write_whole(folder / "report.html", lambda file: file.write(page.encode()))


def html_page(text: str, folder: Path, *, title: str) -> str:
    """Markdown as one HTML file with its pictures, PNG files in `folder`, inside."""
    # imported here: tables of scores do without
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = renderer.parse(text)
    for token in tokens:
        for inner in token.children or ():
            picture = folder / str(inner.attrs.get("src", ""))
            # a name of a class or a model may read as a picture, and is none
            if inner.type == "image" and picture.is_file():
                data = base64.b64encode(picture.read_bytes()).decode()
                inner.attrs["src"] = f"data:image/png;base64,{data}"
    body = renderer.renderer.render(tokens, renderer.options, {})
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table.

    >>> print(markdown_table(("a", "b"), [("1", "2")]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def markdown_picture(file: Path, caption: str) -> str:
    """A picture beside the report, with its caption below."""
    return f"![{caption}]({file.name})\n\n{caption}"


def joined(parts: Iterable[str]) -> str:
    """Paragraphs, tables and headings as one text."""
    return "\n\n".join(parts) + "\n"


def report_text(record: EvaluationRecord, out: Path) -> str:
    """The report as Markdown, with the pictures that lie in `out`."""
    return joined(_parts(record, out))


def _parts(record: EvaluationRecord, out: Path) -> Iterator[str]:
    protocol, subject = record.protocol, record.subject
    yield f"# Evaluation of {subject.name}"
    yield _summary(record)
    for warning in record.warnings:
        yield f"> **Note.** {warning}"
    yield "## Scores"
    yield markdown_table(HEAD, [score_cells(score) for score in record.scores])
    yield (
        f"Floor: real images that are disjoint from the reference. Ceiling: the same images, blurred until little more "
        f"than their mean colour is left. Both are measured as the samples are: n = {protocol.chunk_images} images "
        f"against n = {protocol.chunk_images} of the reference. A distance of the N = {protocol.num_samples} samples "
        "is the mean over disjoint chunks of n, +- their standard deviation; brackets hold 95 % intervals of means "
        "over images: Wilson's of a share, a bootstrap of any other. Numbers compare only where features, n, image "
        "size and reference are the same, which `isthmus compare` checks."
    )
    yield from _pictures(out)
    if record.class_scores:
        columns = list(dict.fromkeys(name for found in record.class_scores.values() for name in found))
        yield "## Classes"
        yield markdown_table(
            ("class", *columns),
            [(name, *(number(found.get(column)) for column in columns)) for name, found in record.class_scores.items()],
        )
    if record.held_out:
        yield "## The model on held-out images"
        yield markdown_table(HEAD, [score_cells(score) for score in record.held_out])
    if record.curves:
        yield "## Step by step"
        yield from _picture(out / CURVES, "Held-out images and samples, by step of the generation")
        for curve in record.curves:
            if len(curve.positions) <= _MOST_COLUMNS:
                yield markdown_table((curve.along, *curve.positions), [(curve.name, *map(number, curve.values))])
            if curve.note:
                yield curve.note
    if record.sweep:
        yield "## Guidance"
        yield from _picture(out / SWEEP, "Scores against guidance")
        names = [score.name for score in next(iter(record.sweep.values()))]
        rows = [(words, *(with_spread(score) for score in scores)) for words, scores in record.sweep.items()]
        yield markdown_table(("guidance", *names), rows)
    yield "## Everything that made these numbers"
    yield markdown_table(("what", "value"), [(name, value) for name, value in _facts(record)])
    if record.data.get("attribution"):
        yield record.data["attribution"]


def score_cells(score: Score) -> tuple[str, ...]:
    """A row of the table of scores."""
    images = str(score.images) if score.images else ""
    if score.measurements > 1:
        images = f"{score.measurements} x {images}"
    cells = (number(score.value), _uncertainty(score), number(score.floor), number(score.ceiling))
    return (score.name, *cells, images, score.better, score.note)


def with_spread(score: Score) -> str:
    """A value and its uncertainty in one cell."""
    return f"{number(score.value)} {_uncertainty(score)}".strip()


def number(value: float | None) -> str:
    """Four digits; nothing for nothing."""
    if value is None:
        return ""
    return f"{value:.4g}"


def _uncertainty(score: Score) -> str:
    if score.low is not None and score.high is not None:
        return f"[{number(score.low)}, {number(score.high)}]"
    if score.error is not None:
        return f"+- {number(score.error)} (standard error)"
    if score.deviation is not None:
        return f"+- {number(score.deviation)}"
    return ""


def _summary(record: EvaluationRecord) -> str:
    protocol, subject = record.protocol, record.subject
    drawn = "" if subject.seed is None else f", drawn with seed {subject.seed}, {sampling_words(subject)}"
    return (
        f"{subject.kind}. N = {protocol.num_samples} samples ({protocol.balance}){drawn}; n = {protocol.chunk_images} "
        f"per measurement; features {protocol.features} at {protocol.image_size} px; reference: {protocol.reference}."
    )


def sampling_words(subject: Subject) -> str:
    """How the samples were drawn; nothing for images from elsewhere."""
    return SamplingOptions.from_dict(subject.sampling).words() if subject.sampling else ""


def _pictures(out: Path) -> Iterator[str]:
    yield from _picture(out / SAMPLES, "Samples; rows are classes, where there are any")
    yield from _picture(
        out / NEIGHBOURS,
        "Samples over their nearest training images, with the distance in feature space: the nearest of all at the "
        "left, then evenly spread to the farthest",
    )


def _picture(file: Path, caption: str) -> Iterator[str]:
    if file.is_file():
        yield markdown_picture(file, caption)


def _facts(record: EvaluationRecord) -> Iterator[tuple[str, str]]:
    for part in (record.subject, record.protocol):
        for name, value in vars(part).items():
            yield name.replace("_", " "), _text(value)
    for group in (record.data, record.circumstances):
        for name, value in group.items():
            yield name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
