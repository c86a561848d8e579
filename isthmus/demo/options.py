"""Options of `isthmus demo`. This file imports nothing heavy: the command line is derived from it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Prepare images, train a tokenizer and an SRDD prior, sample, and write a report."""

    out: Path = Path("demo")
    """Folder of everything the demo makes; finished stages in it are used again."""
    classes: tuple[str, ...] = ("face", "flag", "hand", "person")
    """Classes of openmoji, or `all` for the ten."""
    seed: int = 0
    """Decides the training and the samples."""
