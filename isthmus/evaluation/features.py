"""Features of many images: everything streams, and only the features are kept."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, UInt8

from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource
from isthmus.errors import UserError
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.pictures import to_uint8


def extract_features(
    network: FeatureNetwork, images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]], *, batch_size: int = 64
) -> dict[str, Float[np.ndarray, "n _"]]:
    """Features of every image, one row each, by space (and the logits of networks that have them).

    An image's features do not depend on its neighbours in the batch, beyond the rounding of sums.

    Args:
        network: from `feature_network`.
        images_uint8: an array (n, h, w, 3) or any iterable of (h, w, 3) arrays, all of one size, 0..255.
        batch_size: images per forward pass.

    Raises:
        UserError: images of two sizes, or too small for the network.
    """
    parts: dict[str, list[np.ndarray]] = {}
    source = iter(images_uint8)
    while batch := list(islice(source, batch_size)):
        if len({image.shape for image in batch}) > 1:
            sizes = sorted({image.shape[:2] for image in batch})
            raise UserError(f"images must have one size, got {sizes[:3]}. Resize them first.")
        for name, rows in network(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)).items():
            parts.setdefault(name, []).append(rows.numpy())
    if not parts:
        return {name: np.empty((0, width), np.float32) for name, width in network.spaces.items()}
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def source_images(source: ImageSource, image_size: int) -> Iterator[UInt8[np.ndarray, "_ _ 3"]]:
    """The images of a split as they are evaluated: shorter side resized, central square, 8-bit values."""
    views = EvaluationImages(source, image_size)
    for index in range(len(views)):
        yield to_uint8(torch.as_tensor(views[index]["image"]).unsqueeze(0))[0]
