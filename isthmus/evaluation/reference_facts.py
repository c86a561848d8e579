"""What a record says of the real images, and whether they fit the samples at all."""

from typing import Any

from isthmus.errors import UserError
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.real_side import DataSplits, Reference
from isthmus.evaluation.scoring import statistics_space


def check_fit(against: Reference, network: FeatureNetwork, size: tuple[int, int]) -> None:
    """Raise UserError where the reference has another image size than the samples, or statistics of other features."""
    if against.images is None:
        statistics_space(against, network)
    elif against.images.size() != size:
        raise UserError(
            f"samples and reference must have one size, got {size} and {against.images.size()}. Resize one of them."
        )


def measured_with(network: FeatureNetwork, against: Reference, num: int, size: tuple[int, int]) -> dict[str, Any]:
    """Fields of the `Protocol` that samples of a model and images from elsewhere share."""
    return {
        "features": network.name,
        "features_sha256": network.weights_sha256,
        "preprocessing": network.preprocessing,
        "num_samples": num,
        "chunk_images": against.images_per_measurement(num),
        "image_size": f"{size[0]} x {size[1]}",
        "reference": against.words,
        "reference_images": 0 if against.images is None else len(against.images),
        "reference_sha256": against.fingerprint,
    }


def data_facts(splits: DataSplits) -> dict[str, Any]:
    """What a record says of the data set."""
    return {
        "name": splits.spec,
        "classes": list(splits.class_names),
        "training images": splits.num_train,
        "training images measured": len(splits.train),
        "held-out images": len(splits.held_out),
        "train fingerprint": splits.train.fingerprint,
        "held-out fingerprint": splits.held_out.fingerprint,
        "attribution": splits.attribution,
    }
