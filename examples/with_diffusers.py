"""Any saved model as a diffusers pipeline: a table of how one image per class grows, step by step.

    python examples/with_diffusers.py demo/model --out steps.png

Needs `pip install "isthmus[diffusers]"`. Rows are classes, columns the steps of the call.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from isthmus.diffusers import from_pretrained
from isthmus.pictures import save_picture, table


@dataclass
class Options:
    """What is drawn."""

    model: Annotated[str, tyro.conf.Positional]
    """A pipeline folder or hub id, of either family."""
    out: Path = Path("steps.png")
    """The picture."""
    most_classes: int = 10
    """Rows at most."""
    stop_after: int | None = None
    """Interrupt the call after this many steps; None draws to the end."""
    seed: int = 0
    """Of the generator."""


def main(options: Options) -> None:
    pipe = from_pretrained(options.model, device_map="auto")
    columns = []

    def keep(pipe, step, t, kwargs):
        columns.append(pipe.decode_latents(kwargs["latents"]))
        pipe._interrupt = step + 1 == options.stop_after

    count = min(pipe.native.num_classes, options.most_classes)
    labels = list(range(count)) or [None]
    generator = torch.Generator().manual_seed(options.seed)
    images = pipe(labels, generator=generator, callback_on_step_end=keep).images
    assert all(a.tobytes() == b.tobytes() for a, b in zip(images, columns[-1], strict=True)), "the last preview"
    names = ["image" if label is None else pipe.native.label_name(label) for label in labels]
    steps = [f"step {i}" for i in range(1, len(columns) + 1)]
    rows = [list(row) for row in zip(*columns, strict=True)]
    print(save_picture(table(rows, row_names=names, column_names=steps), options.out))


if __name__ == "__main__":
    main(tyro.cli(Options))
