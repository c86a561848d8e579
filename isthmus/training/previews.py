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


def preview_images(views: EvaluationImages, num_images: int = 8) -> tuple[Images, Sequence[int]]:
    """Held-out images in [-1, 1], spread over all, and their numbers."""
    numbers = spread(len(views), num_images)
    return views.__getitems__(numbers)["image"], numbers


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
    *,
    per_class: int = 8,
    num_classes: int = 10,
) -> Path:
    """Rows = the first classes (or the null class of a model without), columns = seeds.

    `draw` makes pictures of labels and (seed, number) pairs.
    """
    shown = min(null_class_id, num_classes)
    classes = list(range(shown)) or [null_class_id]
    labels = torch.tensor([label for label in classes for _ in range(per_class)])
    pictures = draw(labels, [(PREVIEW_SEED, i) for i in range(len(labels))])
    rows = [pictures[i : i + per_class] for i in range(0, len(pictures), per_class)]
    return save_picture(table(rows, row_names=list(class_names[:shown])), folder / f"samples-{step:08d}.png")
