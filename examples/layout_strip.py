"""The layout of one image under every label: a strip of how many of its first tokens are kept.

    python examples/layout_strip.py demo-dar/model drawing.png --out layout.png

Rows are classes, columns are tokens kept (0, 8, 12, 16 and 32 of 256, scaled to the model); the image itself is last.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from isthmus import load_pipeline
from isthmus.pictures import save_picture, table, to_pil
from isthmus.pipelines.images import to_images

SHARES = (0, 8 / 256, 12 / 256, 16 / 256, 32 / 256)


@dataclass
class Options:
    """What is drawn."""

    model: Annotated[str, tyro.conf.Positional]
    """A D-AR pipeline folder or hub id."""
    image: Annotated[Path, tyro.conf.Positional]
    """Whose layout is kept."""
    out: Path = Path("layout.png")
    """The picture."""
    most_classes: int = 10
    """Rows at most."""
    seed: int = 0
    """Row r is image r of this seed, whatever is kept."""


def main(options: Options) -> None:
    pipe = load_pipeline(options.model)
    total = pipe.token_layout.num_tokens
    kept = sorted({round(share * total) for share in SHARES})
    original = to_images(Image.open(options.image), pipe.image_size)
    rows, labels = [], range(min(pipe.num_classes, options.most_classes))
    for label in labels:
        images = pipe(
            [label] * len(kept),
            prefix_image=original,
            prefix_tokens=kept,
            seed=options.seed,
            image_index=[label] * len(kept),
        ).images
        rows.append([*images, *to_pil(original)])
    columns = [*(f"{tokens} tokens" for tokens in kept), "image"]
    names = [pipe.label_name(label) for label in labels]
    print(save_picture(table(rows, row_names=names, column_names=columns), options.out))


if __name__ == "__main__":
    main(tyro.cli(Options))
