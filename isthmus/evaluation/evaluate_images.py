"""`isthmus evaluate --samples`: images from anywhere, measured as a model's samples are."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from isthmus.errors import UserError
from isthmus.evaluation.circumstances import circumstances
from isthmus.evaluation.evaluation_folder import finish, finished_record
from isthmus.evaluation.feature_networks import feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.guards import check_value_range
from isthmus.evaluation.image_sets import ImageSet, open_images
from isthmus.evaluation.protocol import EvaluationRecord, Protocol, Subject, write_record
from isthmus.evaluation.real_side import DataSplits, choose_reference, measure_real_side, open_splits
from isthmus.evaluation.reference_facts import check_fit, data_facts, measured_with
from isthmus.evaluation.report_pictures import look_at_samples
from isthmus.evaluation.scoring import nearest_training_images, score_samples
from isthmus.pipelines.loading import choose_device

logger = logging.getLogger("isthmus")


def evaluate_images(
    samples: Path,
    out: Path,
    *,
    reference: Path | None = None,
    data: str | None = None,
    classes: Sequence[str] = (),
    features: str = "lite0",
    device: str = "auto",
) -> None:
    """Score anyone's images: an .npz file or a folder, against another or against a data set.

    Args:
        samples: as for `open_images`.
        out: folder of evaluation.json and the report; new, or of the same images.
        reference: images or statistics to measure against; None takes those of the data set.
        data: data set whose training images judge classes and copies; None leaves both out.
        classes: of the data; none are all.
        features: as for `feature_network`.
        device: where features are computed.

    Raises:
        UserError: an argument is not usable, a guard refuses, or `out` holds something else.
    """
    where = choose_device(device)
    network = feature_network(features, device=where)
    images = open_images(samples)
    size = images.size()
    if data is not None and size[0] != size[1]:
        raise UserError(f"a data set is brought to square images, the samples are {size}. Pass --reference instead.")
    splits = None if data is None else open_splits(data, image_size=size[0], classes=tuple(classes), wanted=())
    against = choose_reference(splits, reference, image_size=min(size))
    check_fit(against, network, size)
    labels, names = _matched_labels(images, splits)
    protocol = Protocol(
        **measured_with(network, against, len(images), size),
        balance="as in the samples",
        classes=() if splits is None else splits.class_names,
    )
    subject = Subject(
        name=str(samples), kind="images from elsewhere", fingerprint=images.fingerprint, sampling={}, steering={}
    )
    done = finished_record(out, protocol, subject, sweep=[], measures={})
    if done is None:
        start = time.perf_counter()
        check_value_range(images)
        found = extract_features(network, images.shown("samples"))
        real = measure_real_side(against, splits, network, protocol.chunk_images)
        scored = score_samples(found, labels, against, real, network, names)
        near = nearest_training_images(found, real, network)
        warning = look_at_samples(images, labels, names, out, near, splits)
        done = EvaluationRecord(
            protocol=protocol,
            subject=subject,
            data={} if splits is None else data_facts(splits),
            circumstances=circumstances(where, processes=1) | {"seconds": {"all": time.perf_counter() - start}},
            warnings=(*scored.warnings, *([warning] if warning else [])),
            scores=scored.scores,
            class_scores=scored.by_class,
            measures={},
            sweep={},
        )
        write_record(done, out)
    finish(done, out)


def _matched_labels(images: ImageSet, data: DataSplits | None) -> tuple[Int[np.ndarray, " n"] | None, tuple[str, ...]]:
    """Classes of images from elsewhere in the order of the data set; None where they cannot be told."""
    if data is None or images.labels is None or not data.class_names:
        return None, ()
    names = data.class_names
    if images.class_names:
        if not set(images.class_names) <= set(names):
            logger.warning("%s has classes that %s has not; class scores are left out", images.name, data.spec)
            return None, ()
        return np.array([names.index(name) for name in images.class_names])[images.labels], names
    if images.labels.min() < 0 or images.labels.max() >= len(names):
        logger.warning("%s has labels beyond the classes of %s; class scores are left out", images.name, data.spec)
        return None, ()
    return images.labels, names
