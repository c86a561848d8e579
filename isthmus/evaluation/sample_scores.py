"""All that is said of a set of samples, from their features: scores in the order to read them, warnings, neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from isthmus.errors import UserError
from isthmus.evaluation.features import FeatureNetwork, score_name
from isthmus.evaluation.guards import (
    FEWEST_FOR_FRECHET,
    check_balance,
    check_classes,
    check_copy_distance,
    check_enough_images,
    check_small_set,
)
from isthmus.evaluation.neighbours import copy_distance, nearest_neighbours
from isthmus.evaluation.record import Protocol, Score
from isthmus.evaluation.reference import DataSplits, RealSide, Reference, choose_reference, measure_real_side
from isthmus.evaluation.scores import (
    Features,
    LabelledFeatures,
    class_consistency,
    distance_scores,
    inception_score_list,
    manifold_score_list,
    memorisation,
)
from isthmus.evaluation.statistics import Gaussian, frechet_distance
from isthmus.files import sha256_of_parts

RealSides = dict[str, RealSide]
"""Real sides that were measured before: of many models against the same images, the first one alone measures."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest training image of every sample, and its Euclidean distance in the headline space."""

    index: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class SampleScores:
    """What was found.

    Attributes:
        scores: those to read first come first.
        by_class: class -> name -> value.
        warnings: of the guards.
        neighbours: None where there are no training images.
    """

    scores: tuple[Score, ...]
    by_class: dict[str, dict[str, float]]
    warnings: tuple[str, ...]
    neighbours: Neighbours | None


def score_samples(
    samples: Features,
    labels: Int[np.ndarray, " n"] | None,
    reference: Reference,
    real: RealSide,
    network: FeatureNetwork,
    names: Sequence[str],
) -> SampleScores:
    """Distances, neighbourhoods, classes and copies.

    Args:
        samples: features by space.
        labels: their classes, in the order of `names`; None where they have none.
        reference: what they are measured against.
        real: the same, measured.
        network: whose features these are.
        names: classes of the data set.

    Raises:
        UserError: a file of statistics was made with other features.
    """
    headline = next(iter(network.spaces))
    rows = samples[headline]
    warnings: list[str | None] = list(real.warnings)
    distances, neighbourhoods, n = [], [], len(rows)
    if real.reference is not None:
        n = len(real.reference)
        warnings.append(check_small_set(n))
        warnings += [check_enough_images(n, width, space=space) for space, width in network.spaces.items()]
        distances = distance_scores(samples, real.reference, network)
        halves = (real.reference.reference[headline], real.reference.other[headline], real.reference.ruined[headline])
        neighbourhoods = manifold_score_list(rows, *halves, space=headline)
    if reference.statistics is not None:
        space = statistics_space(reference, network)
        warnings.append(check_enough_images(len(rows), network.spaces[space], space=space))
        distances = _with_statistics(distances, samples[space], reference, space, network, n)
    distances = [*distances, *inception_score_list(samples, real.reference, network)]
    known, classes, by_class, neighbours, copies = reference.images, [], {}, None, []
    if labels is not None and names:
        if known is not None and known.labels is not None and known.class_names == tuple(names):
            warnings.append(check_balance(labels, known.labels, names))
        if real.training is not None and real.held_out is not None:
            warnings.append(check_classes(labels))
            if warnings[-1] is None:
                judged = LabelledFeatures(rows, labels)
                classes, by_class = class_consistency(judged, real.training, real.held_out, names, space=headline)
    if real.training is not None:
        neighbours = Neighbours(*nearest_neighbours(rows, real.training.rows))
        warnings.append(check_copy_distance(copy_distance(real.held_out_distances)))
        note = "; ".join(filter(None, (real.searched, f"features {headline}")))
        copies = memorisation(neighbours.distance, real.held_out_distances, real.view_distances, note=note)
    if n < FEWEST_FOR_FRECHET:
        # the kernel distance, then class consistency, lead
        scores = [*distances[:1], *classes[:1], *copies, *distances[1:], *classes[1:], *neighbourhoods]
    else:
        scores = [*distances, *classes, *copies, *neighbourhoods]
    said = dict.fromkeys(one for one in warnings if one is not None)
    return SampleScores(tuple(scores), by_class, tuple(said), neighbours)


def statistics_space(reference: Reference, network: FeatureNetwork) -> str:
    """The feature space in which a file of statistics was made, as it says itself, or else as its width tells.

    Raises UserError where it was made with other features, weights or preprocessing.
    """
    statistics, origin = reference.statistics, reference.origin
    assert statistics is not None, "a reference is images or statistics"
    if origin is not None:
        ours = {space: (space, network.weights_sha256, network.preprocessing) for space in network.spaces}
        theirs = (origin.space, origin.weights_sha256, origin.preprocessing)
        if ours.get(origin.space) != theirs:
            raise UserError(
                f"{reference.words} are of {origin.space} ({origin.weights_sha256[:12]}; {origin.preprocessing}), the "
                f"features {network.name} are {' or '.join(network.spaces)} ({network.weights_sha256[:12]}; "
                f"{network.preprocessing}). Make the statistics again with --statistics, or pass a reference of images."
            )
        return origin.space
    width = len(statistics.mean)
    fitting = next((space for space, own in network.spaces.items() if own == width), None)
    if fitting is None:
        raise UserError(
            f"{reference.words} are {width} wide, the features {network.name} are "
            f"{' or '.join(map(str, network.spaces.values()))}. "
            "Pass --features inception:FILE for statistics of ADM's evaluator, or a reference of images."
        )
    return fitting


def _with_statistics(
    distances: Sequence[Score],
    rows: Float[np.ndarray, "_ d"],
    reference: Reference,
    space: str,
    network: FeatureNetwork,
    n: int,
) -> list[Score]:
    """`distances` with that of all samples to the reference's mu and sigma; the one to images of its name says so."""
    assert reference.statistics is not None, "a reference is images or statistics"
    without = "file holds no images"
    if reference.images is not None:
        without = "images of the file are other and fewer than its statistics"
    found = Score(
        name=score_name("frechet", space, len(rows), network.input_size),
        value=frechet_distance(Gaussian.of(rows), reference.statistics),
        better="lower",
        images=len(rows),
        note=f"all samples against mu and sigma of the reference; floor and ceiling are unknown: the {without}",
    )
    of_images = score_name("frechet", space, n, network.input_size)
    others = list(distances)
    for place, one in enumerate(others):
        if one.name == of_images:
            note = f"to the images of the reference, not its mu and sigma; {one.note}"
            others[place] = replace(one, name=f"{one.name} to the images", note=note)
    # few images: the kernel distance keeps the lead
    place = min(len(others), int(n < FEWEST_FOR_FRECHET))
    return [*others[:place], found, *others[place:]]


def fitting(against: Reference, network: FeatureNetwork, size: tuple[int, int]) -> Reference:
    """The reference as far as it fits samples of `size` pixels (height, width) and the features.

    Statistics of other features that lie beside images are left out, with a warning. Raises UserError where the images
    have another size than the samples, or there is nothing but statistics of other features.
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


@dataclass(frozen=True, eq=False)
class RealImages:
    """What images are measured against, and by which features: one protocol for any number of sets.

    Attributes:
        splits: the data set that judges classes and copies; None where there is none.
        reference: what distances are taken to.
        size: height and width in pixels of what is measured.
        sides: what was measured of real images before.
    """

    network: FeatureNetwork
    splits: DataSplits | None
    reference: Reference
    size: tuple[int, int]
    sides: RealSides = field(default_factory=RealSides)

    @classmethod
    def of(
        cls,
        network: FeatureNetwork,
        splits: DataSplits | None,
        reference: Path | None = None,
        *,
        size: tuple[int, int],
        sides: RealSides | None = None,
    ) -> "RealImages":
        """Those of a data set, or of `reference`; nothing is measured yet.

        Raises UserError where there is no reference, or it does not fit images of this size or the features.
        """
        fits = fitting(choose_reference(splits, reference, size=size), network, size)
        return cls(network, splits, fits, size, {} if sides is None else sides)

    def protocol(self, num: int, balance: str) -> Protocol:
        """How `num` samples with these frequencies of the classes, in words, are measured."""
        against, splits = self.reference, self.splits
        resized = "" if against.images is None else against.images.resized
        return Protocol(
            features=self.network.name,
            features_sha256=self.network.weights_sha256,
            preprocessing=self.network.preprocessing + (f"; reference images: {resized}" if resized else ""),
            num_samples=num,
            chunk_images=against.images_per_measurement(num),
            balance=balance,
            image_size=f"{self.size[0]} x {self.size[1]}",
            classes=() if splits is None else splits.class_names,
            reference=against.words,
            reference_images=0 if against.images is None else len(against.images),
            reference_sha256=against.fingerprint,
            train_sha256="" if splits is None else splits.train.fingerprint,
            held_out_sha256="" if splits is None else splits.held_out.fingerprint,
        )

    def measured(self, num: int) -> RealSide:
        """The real images as `num` samples are measured against them; what `sides` has is not measured again.

        Raises UserError where the reference is the training set, or its images cannot be used.
        """
        n, images, data = self.reference.images_per_measurement(num), self.reference.images, self.splits
        against = (self.reference.fingerprint, self.reference.holds_training, images and (images.resized, self.size))
        judged = data and (data.train.fingerprint, data.held_out.fingerprint, data.class_names, data.num_train)
        key = sha256_of_parts(against, judged, self.network.name, self.network.weights_sha256, n)
        if key not in self.sides:
            self.sides[key] = measure_real_side(self.reference, data, self.network, n)
        return self.sides[key]

    def scores(
        self, samples: Features, labels: Int[np.ndarray, " n"] | None, names: Sequence[str] = ()
    ) -> SampleScores:
        """What is said of samples; arguments as for `score_samples`."""
        real = self.measured(len(next(iter(samples.values()))))
        return score_samples(samples, labels, self.reference, real, self.network, names)


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
