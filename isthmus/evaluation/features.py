"""Judging samples offline, on the features of EfficientNet-Lite0: do they look like their class, are they copies?

Everything streams: images may come from a generator, and only their features are kept. Numbers compare only within the
same image size and number of images.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.models.efficientnet_lite import HEAD_WIDTH, TAP_CHANNELS, EfficientNetLite0


@dataclass(frozen=True)
class Lite0Arrays:
    """Features of N images, one row each: the last tap averaged over space, and the pooled head."""

    pooled_192: Float[np.ndarray, "n 192"]
    pooled_1280: Float[np.ndarray, "n 1280"]


def lite0_features(
    images: Iterable[Float[Tensor, "3 h w"]],
    *,
    batch_size: int = 64,
    network: EfficientNetLite0 | None = None,
    device: str | torch.device = "cpu",
) -> Lite0Arrays:
    """Features of images in [-1, 1], all of one size: a (n, 3, h, w) tensor, or any iterable of (3, h, w) tensors.

    Give images at their native size. An image's features do not depend on its neighbours in the batch.
    """
    network = EfficientNetLite0() if network is None else network
    network = network.to(device)
    middle, head = [np.empty((0, TAP_CHANNELS[-1]), np.float32)], [np.empty((0, HEAD_WIDTH), np.float32)]
    source = iter(images)
    while batch := list(islice(source, batch_size)):
        if len({image.shape for image in batch}) > 1:
            sizes = sorted({tuple(image.shape[1:]) for image in batch})
            raise UserError(f"images must have one size, got {sizes[:3]}. Resize them first.")
        with torch.inference_mode():
            features = network.features(torch.stack(batch).to(device))
        middle.append(features.taps[-1].mean(dim=(2, 3)).cpu().numpy())
        head.append(features.pooled.cpu().numpy())
    return Lite0Arrays(np.concatenate(middle), np.concatenate(head))


@dataclass(frozen=True)
class NearestClassMean:
    """A classifier that is nothing but one mean per class: the class whose mean is nearest (Euclidean) wins."""

    classes: Int[np.ndarray, " c"]
    means: Float[np.ndarray, "c d"]

    @classmethod
    def fit(cls, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> "NearestClassMean":
        """Average the training features of every class that occurs. Raises `UserError` when there is no image."""
        if not len(labels):
            raise UserError("class means need at least one labelled image, got none. Pass the training features.")
        classes, index = np.unique(labels, return_inverse=True)
        sums = np.zeros((len(classes), features.shape[1]))
        np.add.at(sums, index, features)
        return cls(classes, sums / np.bincount(index)[:, None])

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """Label of the nearest mean for every row."""
        distances = torch.cdist(_double(features), _double(self.means))
        return self.classes[distances.argmin(dim=1).numpy()]

    def accuracy(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
        """Share in [0, 1] of rows whose nearest mean is that of their label; a label never seen counts as wrong."""
        if not len(labels):
            raise UserError("accuracy needs at least one image, got none. Pass features of samples or held-out images.")
        return float((self.predict(features) == labels).mean())


def nearest_neighbour_distances(
    queries: Float[np.ndarray, "n d"], references: Float[np.ndarray, "m d"], *, block_size: int = 1024
) -> Float[np.ndarray, " n"]:
    """Euclidean distance of each query to the nearest reference; 0 exactly for a copy. `block_size` bounds memory."""
    if not len(references):
        raise UserError("nearest neighbours need at least one reference, got none. Pass the training features.")
    nearest = np.full(len(queries), np.inf)
    for start in range(0, len(references), block_size):
        # differences, not the matrix product of torch.cdist's fast mode: that one puts copies at a distance
        distances = torch.cdist(
            _double(queries),
            _double(references[start : start + block_size]),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        nearest = np.minimum(nearest, distances.min(dim=1).values.numpy())
    return nearest


def memorised_share(
    samples: Float[np.ndarray, "n d"],
    training: Float[np.ndarray, "m d"],
    held_out: Float[np.ndarray, "k d"],
    *,
    quantile: float = 0.01,
) -> float:
    """Share in [0, 1] of samples that are nearer to a training image than (nearly) every held-out image is.

    The threshold is the `quantile` of the held-out images' distances to their nearest training image. Held-out images
    were not copied, so about `quantile` is what a model without memory scores; 1 means that every sample is a copy.
    """
    if not len(samples) or not len(held_out):
        raise UserError(
            f"the share of copies needs samples and held-out images, got {len(samples)} and {len(held_out)}. Pass both."
        )
    threshold = np.quantile(nearest_neighbour_distances(held_out, training), quantile)
    return float((nearest_neighbour_distances(samples, training) < threshold).mean())


def _double(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
