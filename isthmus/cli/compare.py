"""`isthmus compare`: one table of evaluations that were measured in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from isthmus.cli.parsing import parse
from isthmus.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Compare:
    """One table of evaluations; refused where they were not measured in the same way."""

    evaluations: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folders that `isthmus evaluate` wrote."""
    out: Path | None = None
    """Also write the table to this file (Markdown)."""

    def __post_init__(self):
        if len(self.evaluations) < 2:
            raise UserError(f"a comparison needs at least two evaluations, got {len(self.evaluations)}.")


def run(arguments: Sequence[str]) -> None:
    """Print, and write where asked."""
    command = parse(Compare, arguments, prog="isthmus compare")
    # imported here: --help does without
    from isthmus.data.cache import write_whole
    from isthmus.evaluation.compare import compare

    text = compare(command.evaluations)
    print(text, end="")
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(command.out, lambda file: file.write(text.encode()))
