"""`isthmus evaluate --samples`: images from anywhere, measured as a model's samples are."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from isthmus.data.source import ANY_COLUMNS, WantedColumns
from isthmus.errors import UserError
from isthmus.evaluation.balance import UNKNOWN, balance_words
from isthmus.evaluation.circumstances import circumstances
from isthmus.evaluation.evaluation_folder import (
    STATISTICS,
    finish,
    remove_by_products,
    scored_record,
    write_sample_statistics,
)
from isthmus.evaluation.feature_networks import feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.guards import check_value_range
from isthmus.evaluation.image_sets import ImageSet, open_images
from isthmus.evaluation.processes import is_first_process
from isthmus.evaluation.protocol import EvaluationRecord, Subject, write_record
from isthmus.evaluation.real_side import DataSplits, choose_reference, measure_real_side, open_splits
from isthmus.evaluation.reference_facts import data_facts, fitting, protocol_of
from isthmus.evaluation.report_pictures import look_at_samples
from isthmus.evaluation.scoring import score_samples
from isthmus.files import alone_in
from isthmus.pipelines.loading import choose_device


@alone_in("out")
def evaluate_images(
    samples: Path,
    out: Path,
    *,
    reference: Path | None = None,
    data: str | None = None,
    classes: Sequence[str] = (),
    columns: WantedColumns = ANY_COLUMNS,
    features: str = "lite0",
    statistics: bool = False,
    device: str = "auto",
) -> None:
    """Score anyone's images: an .npz file or a folder, against another or against a data set.

    Of several processes under torchrun the first one works; there is nothing to share.

    Args:
        samples: as for `open_images`.
        out: folder of evaluation.json and the report; new, or of the same images.
        reference: images or statistics to measure against; None takes those of the data set.
        data: data set whose training images judge classes and copies; None leaves both out.
        classes: of the data; none are all.
        columns: of an hf: table.
        features: as for `feature_network`.
        statistics: also write statistics.npz, mean and covariance of the images' features.
        device: where features are computed.

    Raises:
        UserError: an argument is not usable, a guard refuses, or `out` holds something else.
    """
    if not is_first_process():
        return  # there is nothing to draw, so nothing to share
    where = choose_device(device)
    network = feature_network(features, device=where)
    images = open_images(samples)
    size = images.size()
    if data is not None and size[0] != size[1]:
        raise UserError(f"a data set is brought to square images, the samples are {size}. Pass --reference instead.")
    splits = None
    if data is not None:
        splits = open_splits(data, image_size=size[0], classes=tuple(classes), wanted=(), columns=columns)
    against = fitting(choose_reference(splits, reference, size=size), network, size)
    known = matched_classes(images, splits)
    protocol = protocol_of(network, against, splits, len(images), size, known.balance)
    subject = Subject(
        name=str(samples), kind="images from elsewhere", fingerprint=images.fingerprint, sampling={}, steering={}
    )
    done = scored_record(out, protocol, subject, sweep=[])
    start = time.perf_counter()
    found = {}
    if done is None or statistics:
        check_value_range(images)
        found = extract_features(network, images.shown("samples"))
    if done is None:
        remove_by_products(out)
    if statistics:
        write_sample_statistics(out / STATISTICS, found, network)
    if done is None:
        real = measure_real_side(against, splits, network, protocol.chunk_images)
        scored = score_samples(found, known.labels, against, real, network, known.names)
        warning = look_at_samples(images, known.labels, known.names, out, scored.neighbours, splits)
        done = EvaluationRecord(
            protocol=protocol,
            subject=subject,
            data={} if splits is None else data_facts(splits),
            circumstances=circumstances(where, processes=1) | {"seconds": {"all": time.perf_counter() - start}},
            warnings=tuple(one for one in (*scored.warnings, warning, known.warning) if one),
            scores=scored.scores,
            class_scores=scored.by_class,
            measures={},
            sweep={},
        )
        write_record(done, out)
    finish(done, out)


@dataclass(frozen=True, eq=False)
class MatchedClasses:
    """Classes of images from elsewhere, as far as they are known.

    Attributes:
        labels: in the order of the data set; None where they cannot be told.
        names: classes of the data set; empty where labels cannot be told.
        balance: how often each class occurs, in words.
        warning: why class scores are left out, or None.
    """

    labels: Int[np.ndarray, " n"] | None
    names: tuple[str, ...]
    balance: str
    warning: str | None


def matched_classes(images: ImageSet, data: DataSplits | None) -> MatchedClasses:
    """Classes by their names alone: a number says nothing about the order of the classes in another place."""
    if images.labels is None:
        return MatchedClasses(None, (), UNKNOWN, None)
    if data is None or not data.class_names:
        named = images.class_names or tuple(map(str, range(int(images.labels.max()) + 1)))
        return MatchedClasses(None, (), balance_words(images.labels, named), None)
    names = data.class_names
    if not images.class_names:
        return _unmatched(images, f"labels without names, which cannot be matched with the classes of {data.spec}")
    used = np.unique(images.labels)
    absent = [images.class_names[label] for label in used if images.class_names[label] not in names]
    if absent:
        return _unmatched(images, f"the class {absent[0]}, which {data.spec} has not")
    places = np.array([names.index(name) if name in names else -1 for name in images.class_names])
    labels = places[images.labels]
    return MatchedClasses(labels, names, balance_words(labels, names, data.class_counts()), None)


def _unmatched(images: ImageSet, what: str) -> MatchedClasses:
    assert images.labels is not None, "only labelled images can fail to match"
    named = images.class_names or tuple(map(str, range(int(images.labels.max()) + 1)))
    warning = f"The samples have {what}: class scores are left out."
    if len(np.unique(images.labels)) == 1:
        warning += " All samples have one label: a reference of several classes is far from them for that alone."
    return MatchedClasses(None, (), balance_words(images.labels, named), warning)
