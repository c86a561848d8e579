"""One training view of an image, and views put together to a batch."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from isthmus.data.augment import Augmentation, SquareView, augmented_view
from isthmus.data.source import ImageSource

Sample = dict[str, Tensor]
"""One sample: "image" float (3, S, S) in [-1, 1] or "token_ids" (L,); "class_label", "index", "position"."""

Batch = dict[str, Tensor]
"""The same with a batch axis in front."""


def random_view(
    source: ImageSource, index: int, image_size: int, augment: Augmentation, generator: np.random.Generator
) -> SquareView:
    """One training view of image `index`; the generator first draws the raw material, then the augmentation."""
    raw = source.draw(index, generator)
    return augmented_view(raw, image_size, augment, generator, may_flip=bool(source.flip[source.labels[index]]))


def collate(
    views: Sequence[SquareView],
    labels: Int[np.ndarray, " b"],
    indices: Int[np.ndarray, " b"],
    positions: Int[np.ndarray, " b"],
) -> Batch:
    """Views 0..255 and their numbers as one batch of tensors, images in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()
    return {
        "image": pixels.float().div_(127.5).sub_(1),
        "class_label": torch.from_numpy(labels.astype(np.int64)),
        "index": torch.from_numpy(indices.astype(np.int64)),
        "position": torch.from_numpy(positions.astype(np.int64)),
    }
