"""A report as a list of blocks, written as Markdown (pictures beside it) or as one HTML file (pictures inside)."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
img { max-width: 100%; image-rendering: pixelated; }
code { background: #f3f3f3; padding: 0 .25rem; }
.warning { border-left: 4px solid #d08000; background: #fff6e5; padding: .4rem .8rem; }
"""


@dataclass(frozen=True)
class Heading:
    """A title of level 1 or 2."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a warning stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as text, the first row the head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the report."""

    file: Path
    caption: str


Block = Heading | Paragraph | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; pictures are links to files in the same folder."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append("#" * level + " " + text)
            case Paragraph(text, warning):
                parts.append(("> **Note.** " if warning else "") + text)
            case Table(head, rows):
                lines = [head, ["---"] * len(head), *rows]
                parts.append("\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines))
            case Picture(file, caption):
                parts.append(f"![{caption}]({file.name})\n\n{caption}")
    return "\n\n".join(parts) + "\n"


def one_html_file(blocks: Sequence[Block], *, title: str) -> str:
    """The blocks as one HTML file that needs nothing else."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Paragraph(text, warning):
                parts.append(f"<p{' class=warning' if warning else ''}>{html.escape(text)}</p>")
            case Table(head, rows):
                first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
                others = "".join(
                    "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in rows
                )
                parts.append(f"<table><thead><tr>{first}</tr></thead><tbody>\n{others}</tbody></table>")
            case Picture(file, caption):
                data = base64.b64encode(file.read_bytes()).decode()
                text = html.escape(caption)
                parts.append(f'<p><img alt="{text}" src="data:image/png;base64,{data}"><br>{text}</p>')
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
