"""Options of `isthmus demo`. This file imports nothing heavy: the command line is derived from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DRAWN = "avatars:moods,gaze,pixel-art"
"""Styles whose parts are large enough to come through a tokenizer of a minute (docs/benchmarks.md)."""
_OPENMOJI_CLASSES = ("face", "flag", "hand", "person")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Prepare images, train a tokenizer and a prior, sample, evaluate, and write a report."""

    family: Literal["next-scale", "dar"] = "next-scale"
    """next-scale: a multi-scale tokenizer and an SRDD prior; dar: a diffusion tokenizer and a Llama."""
    data: str = DRAWN
    """avatars[:STYLE,...], emoji, openmoji, photos or folder:PATH. Images with captions make a model of prompts,
    others a model of classes."""
    budget: Literal["short", "long"] = "short"
    """short: minutes on two cores; long: four times the training of the tokenizer, and four (next-scale) or three (dar)
    times that of the prior."""
    out: Path | None = None
    """Folder of everything the demo makes; finished stages in it are used again. None: demo or demo-dar, with -long."""
    classes: tuple[str, ...] = ()
    """Classes of the data, or `all`; none given: all, but of openmoji face, flag, hand and person."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Type of the products in training, as for `isthmus train`."""
    seed: int = 0
    """Decides the training and the samples."""

    @property
    def folder(self) -> Path:
        """Where everything goes.

        >>> str(DemoOptions(family="dar", budget="long").folder)
        'demo-dar-long'
        """
        if self.out is not None:
            return self.out
        return Path("demo" + ("-dar" if self.family == "dar" else "") + ("-long" if self.budget == "long" else ""))

    @property
    def chosen_classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None is all of them.

        >>> DemoOptions().chosen_classes, DemoOptions(data="openmoji").chosen_classes
        (None, ('face', 'flag', 'hand', 'person'))
        """
        classes = tuple(self.classes) or (_OPENMOJI_CLASSES if self.data == "openmoji" else ("all",))
        return None if classes == ("all",) else classes
