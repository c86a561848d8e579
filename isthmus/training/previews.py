"""Pictures of a training that can be laid beside each other: the same images and seeds at every step."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from isthmus.data.batches import EvaluationImages
from isthmus.nn.shapes import Images
from isthmus.pictures import save_picture, spread, table, to_pil

PREVIEW_SEED = 0
_COLUMNS = 8


def preview_images(views: EvaluationImages) -> tuple[Images, Sequence[int]]:
    """Up to 8 held-out images in [-1, 1], spread over all, and their numbers."""
    numbers = spread(len(views), 8)
    return views.batch(numbers)["image"], numbers


def save_reconstructions(stages: dict[str, Images], images: Images, folder: Path, step: int) -> Path:
    """Rows = images; columns = what each stage of decoding shows of them, the image itself last."""
    columns = {**stages, "image": images}
    rows = list(zip(*map(to_pil, columns.values()), strict=True))
    return save_picture(table(rows, column_names=list(columns)), folder / f"reconstructions-{step:08d}.png")


def save_samples(
    draw: Callable[[Int[Tensor, " b"], list[tuple[int, int]]], list[Image.Image]],
    class_names: Sequence[str],
    null_class_id: int,
    folder: Path,
    step: int,
) -> Path:
    """Rows = the first ten classes (or the null class of a model without), columns = seeds.

    `draw` makes pictures of labels and (seed, number) pairs.
    """
    shown = min(null_class_id, 10)
    classes = list(range(shown)) or [null_class_id]
    labels = torch.tensor([label for label in classes for _ in range(_COLUMNS)])
    pictures = draw(labels, [(PREVIEW_SEED, i) for i in range(len(labels))])
    rows = [pictures[i : i + _COLUMNS] for i in range(0, len(pictures), _COLUMNS)]
    return save_picture(table(rows, row_names=list(class_names[:shown])), folder / f"samples-{step:08d}.png")
