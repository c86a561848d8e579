"""What a record says of the real images, and whether they fit the samples at all."""

from dataclasses import replace
from typing import Any

from isthmus.errors import UserError
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.protocol import Protocol
from isthmus.evaluation.real_side import DataSplits, Reference
from isthmus.evaluation.scoring import statistics_space


def fitting(against: Reference, network: FeatureNetwork, size: tuple[int, int]) -> Reference:
    """The reference as far as it fits samples of `size` pixels (height, width) and the features.

    Statistics of other features that lie beside images are left out, with a warning; so is said of statistics that do
    not tell their features.

    Raises:
        UserError: the images have another size than the samples, or there is nothing but statistics of other features.
    """
    if against.images is None:
        statistics_space(against, network)
        return _checked_by_width(against)
    if against.images.size() != size:
        raise UserError(
            f"samples and reference must have one size, got {size} and {against.images.size()}. Resize one of them."
        )
    if against.statistics is None:
        return against
    if len(against.statistics.mean) in network.spaces.values():
        return _checked_by_width(against)
    words = f"{len(against.images)} images of {against.images.name}"
    warning = (
        f"The mu and sigma beside the reference images are {len(against.statistics.mean)} wide, the features "
        f"{network.name} are not: every score is measured against the images alone."
    )
    return replace(against, words=words, statistics=None, warnings=(*against.warnings, warning))


def _checked_by_width(against: Reference) -> Reference:
    if against.origin is not None:
        return against
    warning = (
        f"The mu and sigma of the reference ({against.words}) do not say of which features they are, so only their "
        "width could be checked. They must be of the very network and preprocessing that this report names."
    )
    return replace(against, warnings=(*against.warnings, warning))


def protocol_of(
    network: FeatureNetwork,
    against: Reference,
    splits: DataSplits | None,
    num: int,
    size: tuple[int, int],
    balance: str,
) -> Protocol:
    """How `num` samples of `size` pixels (height, width) are measured.

    Args:
        network: of the features.
        against: the reference.
        splits: the data set that judges classes and copies; None where there is none.
        num: N.
        size: of the samples.
        balance: how often each class occurs, in words.
    """
    resized = "" if against.images is None else against.images.resized
    return Protocol(
        features=network.name,
        features_sha256=network.weights_sha256,
        preprocessing=network.preprocessing + (f"; reference images: {resized}" if resized else ""),
        num_samples=num,
        chunk_images=against.images_per_measurement(num),
        balance=balance,
        image_size=f"{size[0]} x {size[1]}",
        classes=() if splits is None else splits.class_names,
        reference=against.words,
        reference_images=0 if against.images is None else len(against.images),
        reference_sha256=against.fingerprint,
        train_sha256="" if splits is None else splits.train.fingerprint,
        held_out_sha256="" if splits is None else splits.held_out.fingerprint,
    )


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
