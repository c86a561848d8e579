"""The report of an evaluation: every number with what it takes to read it, pictures, and a table of several
evaluations.
"""

import base64
import html
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from isthmus.errors import UserError
from isthmus.evaluation.guards import check_duplicates, pixel_digest
from isthmus.evaluation.images import ImageSet, Picture
from isthmus.evaluation.record import (
    COMBINATION,
    AttributeCount,
    Curve,
    EvaluationRecord,
    Readings,
    Score,
    Subject,
    read_record,
    same_protocol,
)
from isthmus.evaluation.reference import DataSplits
from isthmus.evaluation.scores import Neighbours
from isthmus.evaluation.statistics import wilson_interval
from isthmus.files import write_whole
from isthmus.pictures import draw_grid, save_picture, table
from isthmus.pipelines.options import SamplingOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("isthmus")

SAMPLES, NEIGHBOURS, CURVES, SWEEP = "samples.png", "neighbours.png", "curves.png", "sweep.png"
ATTRIBUTES = "attributes.png"
REPORT_FILES = ("evaluation.json", "report.md", "report.html", SAMPLES, NEIGHBOURS, CURVES, SWEEP, ATTRIBUTES)
"""What a report consists of; nothing else is written beside it."""

HEAD = ("score", "value", "uncertainty", "floor", "ceiling", "images", "better", "note")

_ROWS, _COLUMNS, _PAIRS = 20, 10, 10
_SWEPT = 6  # scores of a sweep that are drawn
_MOST_COLUMNS = 40  # of a curve with more positions there is the plot, and the record

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
img { max-width: 100%; image-rendering: pixelated; }
code { background: #f3f3f3; padding: 0 .25rem; }
blockquote { border-left: 4px solid #d08000; background: #fff6e5; margin: 1rem 0; padding: .1rem .8rem; }
"""


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """One panel per curve."""

    def draw(panel: "Axes", curve: Curve) -> None:
        _line(panel, curve.name, curve.positions, curve.values)
        panel.set_xlabel(curve.along)

    draw_grid(curves, draw, path)


def draw_sweep(record: EvaluationRecord, path: Path) -> None:
    """One panel per score: its value against guidance, with the floor as a line."""

    def draw(panel: "Axes", name: str) -> None:
        found = {words: one for words, scores in record.sweep.items() for one in scores if one.name == name}
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


def look_at_samples(
    images: ImageSet,
    labels: Int[np.ndarray, " n"] | None,
    names: Sequence[str],
    out: Path,
    neighbours: Neighbours | None,
    data: DataSplits | None,
) -> str | None:
    """Read the samples once: save samples.png and neighbours.png, and say how many are duplicates.

    Raises UserError where most samples are.
    """
    for earlier in (SAMPLES, NEIGHBOURS, ATTRIBUTES):
        (out / earlier).unlink(missing_ok=True)
    grid = _grid_places(images, labels)
    pairs = [] if neighbours is None else _pair_places(neighbours)
    wanted = {index for _, row in grid for index in row} | set(pairs)
    kept: dict[int, Picture] = {}
    digests = []
    for index, image in enumerate(images):
        digests.append(pixel_digest(image))
        if index in wanted:
            kept[index] = image
    warning = check_duplicates(digests)
    rows = [[Image.fromarray(kept[index]) for index in row] for _, row in grid]
    shown = [names[label] for label, _ in grid] if names and labels is not None else []
    save_picture(table(rows, row_names=shown), out / SAMPLES)
    if neighbours is not None and data is not None and data.train.at is not None:
        above = [Image.fromarray(kept[index]) for index in pairs]
        below = [Image.fromarray(data.train.at(int(neighbours.index[index]))) for index in pairs]
        columns = [f"{neighbours.distance[index]:.3g}" for index in pairs]
        picture = table([above, below], row_names=["sample", "training"], column_names=columns)
        save_picture(picture, out / NEIGHBOURS)
    return warning


def _grid_places(images: ImageSet, labels: Int[np.ndarray, " n"] | None) -> list[tuple[int, list[int]]]:
    """Labels and numbers of the images shown: rows are the first classes, or just rows."""
    if labels is None or labels.max() == 0:
        count = min(len(images), _COLUMNS * 4)
        return [(0, list(range(start, min(start + _COLUMNS, count)))) for start in range(0, count, _COLUMNS)]
    rows = [(int(label), np.flatnonzero(labels == label)[:_COLUMNS].tolist()) for label in np.unique(labels)]
    return rows[:_ROWS]


def _pair_places(neighbours: Neighbours) -> list[int]:
    """The samples nearest to a training image, half of those shown, then evenly spread ones from near to far."""
    order = np.argsort(neighbours.distance, kind="stable")
    near, rest = order[: _PAIRS // 2], order[_PAIRS // 2 :]
    others = rest[np.linspace(0, len(rest) - 1, min(_PAIRS - len(near), len(rest))).round().astype(int)]
    return [*near.tolist(), *others.tolist()]


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
    """Write report.md, and report.html with the pictures of the folder inside: one file that can be sent."""
    page = html_page(text, folder, title=title)
    write_whole(folder / "report.md", text)
    write_whole(folder / "report.html", page)


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
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


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
    yield markdown_table(HEAD, [_score_cells(score) for score in record.scores])
    yield (
        f"Floor: real images that are disjoint from the reference. Ceiling: the same images, blurred until little more "
        f"than their mean colour is left. Both are measured as the samples are: n = {protocol.chunk_images} images "
        f"against n = {protocol.chunk_images} of the reference. A distance of the N = {protocol.num_samples} samples "
        "is the mean over disjoint chunks of n, +- their standard deviation; brackets hold 95 % intervals of means "
        "over images: Wilson's of a share, a bootstrap of any other. Numbers compare only where features, n, image "
        "size and reference are the same, which `isthmus compare` checks."
    )
    yield from _picture(out / SAMPLES, "Samples; rows are classes, where there are any")
    yield from _picture(
        out / NEIGHBOURS,
        "Samples over their nearest training images, with the distance in feature space: the nearest of all at the "
        "left, then evenly spread to the farthest",
    )
    if record.readings:
        yield from _readings(record.readings, out)
    if record.class_scores:
        columns = list(dict.fromkeys(name for found in record.class_scores.values() for name in found))
        yield "## Classes"
        yield markdown_table(
            ("class", *columns),
            [(name, *(number(found.get(column)) for column in columns)) for name, found in record.class_scores.items()],
        )
    if record.held_out:
        yield "## The model on held-out images"
        yield markdown_table(HEAD, [_score_cells(score) for score in record.held_out])
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
        rows = [(words, *(_with_uncertainty(score) for score in scores)) for words, scores in record.sweep.items()]
        yield markdown_table(("guidance", *names), rows)
    yield "## Everything that made these numbers"
    yield markdown_table(("what", "value"), [(name, value) for name, value in _facts(record)])
    if record.data.get("attribution"):
        yield record.data["attribution"]


def _readings(readings: Readings, out: Path) -> Iterator[str]:
    """What was found of what was asked for: a row for all styles, one for each, and one for each of its attributes."""
    reader, counts = readings.reader, readings.counts
    yield "## Attributes"
    yield (
        f"Read by small networks that were trained on {reader['training']}; of {reader['fresh attributes read']:,} "
        f"attributes of other drawings they read {reader['right']:.1%} right (fingerprint "
        f"{reader['fingerprint'][:12]}). Brackets are 95 % intervals (Wilson's). Behind each share stands what they "
        "find in the real drawings of the same captions, which no model can be seen to exceed, and in those of other "
        "captions of the style, which is chance. A combination is a pair of attributes, both right; on held-out "
        "combinations a pair that no training image has."
    )
    # records of before do not know
    known = all(one.rebuilt is not None for one in counts)
    if known:
        yield (
            "Reconstructions are these real drawings after the model's own tokenizer has turned them into tokens and "
            "back. What is lost there, say an eye of three pixels, no prior over these tokens can be expected to draw: "
            "what the column lacks is lost by the tokenizer, what samples lack beyond that by the prior."
        )
    kinds = list(dict.fromkeys(one.prompts for one in counts))
    places = [("all styles", "all"), ("all styles", "parts"), ("all styles", "colours"), ("all styles", COMBINATION)]
    for style in dict.fromkeys(one.style for one in counts):
        named = dict.fromkeys(one.attribute for one in counts if one.style == style)
        places += [(style, "all"), *((style, name) for name in named)]
    rows = []
    for style, name in places:
        of_style = [one for one in counts if style in (one.style, "all styles") and _is_among(one.attribute, name)]
        by_kind = [[one for one in of_style if one.prompts == prompts] for prompts in kinds]
        cells = [cell for counted in by_kind for cell in (_found(counted), *([_kept(counted)] if known else []))]
        if any(cells):
            rows.append((style, name, *cells))
    columns = [column for kind in kinds for column in (kind, *(["reconstructions"] if known else []))]
    yield markdown_table(("style", "attribute", *columns), rows)
    yield from _picture(
        out / ATTRIBUTES,
        "Samples with the largest share of attributes wrong, each style in turn, and the drawings of their captions; "
        "beside them what was asked for and what was read instead",
    )


def _is_among(attribute: str, name: str) -> bool:
    """Whether an attribute belongs to a row of the table.

    >>> _is_among("body colour", "colours"), _is_among("body colour", "parts"), _is_among("combination", "all")
    (True, False, False)
    """
    if name in ("all", "parts", "colours"):
        is_colour = attribute.endswith(" colour")
        return attribute != COMBINATION and (name == "all" or is_colour == (name == "colours"))
    return attribute == name


def _found(counts: Sequence[AttributeCount]) -> str:
    """Share, its interval, what is found in real drawings, and chance; nothing where nothing was asked for."""
    asked, right, real, chance = (
        sum(getattr(one, name) for one in counts) for name in ("asked", "right", "real", "chance")
    )
    if not asked:
        return ""
    interval = wilson_interval(right, asked)
    shares = f"{interval.mean:.1%} [{interval.low:.1%}, {interval.high:.1%}]"
    return f"{shares} of {asked:,}; real {real / asked:.1%}, chance {chance / asked:.1%}"


def _kept(counts: Sequence[AttributeCount]) -> str:
    """Share that is found in reconstructions of the real drawings; nothing where nothing was asked for."""
    asked = sum(one.asked for one in counts)
    return f"{sum(one.rebuilt or 0 for one in counts) / asked:.1%}" if asked else ""


def _score_cells(score: Score) -> tuple[str, ...]:
    """A row of the table of scores."""
    images = str(score.images) if score.images else ""
    if score.measurements > 1:
        images = f"{score.measurements} x {images}"
    cells = (number(score.value), _uncertainty(score), number(score.floor), number(score.ceiling))
    return (score.name, *cells, images, score.better, score.note)


def _with_uncertainty(score: Score) -> str:
    """A value and its uncertainty in one cell."""
    return f"{number(score.value)} {_uncertainty(score)}".strip()


def number(value: float | None) -> str:
    """Four digits; nothing for nothing."""
    return "" if value is None else f"{value:.4g}"


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
    told = f" from {record.data['prompts']}" if "prompts" in record.data else ""
    drawn = "" if subject.seed is None else f", drawn{told} with seed {subject.seed}, {_sampling_words(subject)}"
    return (
        f"{subject.kind}. N = {protocol.num_samples} samples ({protocol.balance}){drawn}; n = {protocol.chunk_images} "
        f"per measurement; features {protocol.features} at {protocol.image_size} px; reference: {protocol.reference}."
    )


def _sampling_words(subject: Subject) -> str:
    """How the samples were drawn; nothing for images from elsewhere."""
    return SamplingOptions.from_dict(subject.sampling).words() if subject.sampling else ""


def _picture(file: Path, caption: str) -> Iterator[str]:
    if file.is_file():
        yield markdown_picture(file, caption)


def _facts(record: EvaluationRecord) -> Iterator[tuple[str, str]]:
    for part in (record.subject, record.protocol):
        for name, value in vars(part).items():
            yield name.replace("_", " "), fact_text(value)
    for group in (record.data, record.circumstances):
        for name, value in group.items():
            yield name, fact_text(value)


def fact_text(value: Any) -> str:
    """A value in a table of facts; floats with four digits."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {fact_text(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(fact_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compare(folders: Sequence[Path]) -> str:
    """Markdown: a row per score, a column per evaluation.

    Raises UserError where one cannot be read, or two were measured in different ways.
    """
    records = [read_record(folder) for folder in folders]
    for folder, record in zip(folders[1:], records[1:], strict=True):
        differences = same_protocol(records[0], record)
        if differences:
            raise UserError(
                f"{folders[0]} and {folder} were measured in different ways, so their scores do not compare: "
                f"{'; '.join(differences)}. Evaluate one of them again in the way of the other."
            )
    protocol, names = records[0].protocol, _column_names(folders)
    return joined(
        [
            "# Comparison",
            f"N = {protocol.num_samples} samples each ({protocol.balance}), n = {protocol.chunk_images} per "
            f"measurement, features {protocol.features}, {protocol.image_size} px, reference: {protocol.reference}.",
            markdown_table(("", *names), _subject_rows(records)),
            markdown_table(("score", "better", *names, "floor", "ceiling"), _score_rows(records)),
            "Uncertainty: [95 % interval] of a mean over images, else +- deviation between chunks of samples. "
            "Likelihoods are those of tokens: they compare only between models on one image tokenizer.",
        ]
    )


def _column_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their whole paths where names repeat."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _subject_rows(records: Sequence[EvaluationRecord]) -> list[tuple[str, ...]]:
    facts = {
        "model": [record.subject.name for record in records],
        "kind": [record.subject.kind for record in records],
        "seed": [str(record.subject.seed) for record in records],
        "sampling": [_sampling_words(record.subject) for record in records],
        "warnings": [str(len(record.warnings)) for record in records],
    }
    return [(name, *values) for name, values in facts.items()]


def _score_rows(records: Sequence[EvaluationRecord]) -> list[tuple[str, ...]]:
    """Scores that any evaluation has, in the order of the first that has them."""
    names = dict.fromkeys(score.name for record in records for score in (*record.scores, *record.held_out))
    rows = []
    for name in names:
        found = [record.score(name) for record in records]
        first = next(score for score in found if score is not None)
        cells = ["" if score is None else _with_uncertainty(score) for score in found]
        rows.append((name, first.better, *cells, number(first.floor), number(first.ceiling)))
    return rows
