"""Pictures of a report: samples by class, and samples beside their nearest training images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from isthmus.evaluation.guards import check_duplicates, pixel_digest
from isthmus.evaluation.image_sets import ImageSet, Picture
from isthmus.evaluation.real_side import DataSplits
from isthmus.evaluation.scoring import Neighbours
from isthmus.pictures import save_picture, table

SAMPLES, NEIGHBOURS = "samples.png", "neighbours.png"
_ROWS, _COLUMNS, _PAIRS = 20, 10, 10


def look_at_samples(
    images: ImageSet,
    labels: Int[np.ndarray, " n"] | None,
    names: Sequence[str],
    out: Path,
    neighbours: Neighbours | None,
    data: DataSplits | None,
) -> str | None:
    """Read the samples once: save samples.png and neighbours.png, and say how many are duplicates.

    Raises:
        UserError: most samples are duplicates.
    """
    for earlier in (SAMPLES, NEIGHBOURS):
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
    near = order[: _PAIRS // 2]
    rest = order[_PAIRS // 2 :]
    spread = rest[np.linspace(0, len(rest) - 1, min(_PAIRS - len(near), len(rest))).round().astype(int)]
    return [int(index) for index in (*near, *spread)]
