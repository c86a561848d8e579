"""All that is said of a set of samples, from features alone: scores in the order to read them, warnings, neighbours.

Every distance stands beside its floor and its ceiling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from isthmus.errors import UserError
from isthmus.evaluation.classes import (
    LinearProbe,
    NearestClassMean,
    accuracy_by_class,
    inception_score,
    intra_class_diversity,
)
from isthmus.evaluation.features import FeatureNetwork, Features, Rows, score_name
from isthmus.evaluation.guards import (
    FEWEST_FOR_FRECHET,
    check_balance,
    check_classes,
    check_copy_distance,
    check_enough_images,
    check_small_set,
)
from isthmus.evaluation.jackknife import error_of, frechet_parts
from isthmus.evaluation.neighbours import (
    COPY_QUANTILE,
    copies,
    copy_distance,
    manifold_scores,
    nearer_than,
    nearest_neighbours,
)
from isthmus.evaluation.record import Protocol, Score
from isthmus.evaluation.reference import (
    DataSplits,
    LabelledFeatures,
    RealFeatures,
    RealSide,
    Reference,
    choose_reference,
    measure_real_side,
)
from isthmus.evaluation.statistics import (
    Gaussian,
    Interval,
    Measurements,
    bootstrap_interval,
    frechet_distance,
    frechet_over_chunks,
    kernel_distance,
    mean_interval,
)
from isthmus.files import sha256_of_parts
from isthmus.nn.draws import SPLIT, stream

_FEWEST_FOR_MANIFOLD = 6  # the fifth neighbour of an image
_FEWEST_TO_SPLIT = 100  # ten images say nothing of classes
_SHARES_OF_SAMPLES = ("precision", "density")  # recall and coverage are means over the real images

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
    """Distances, neighbourhoods, classes and copies; `labels` are in the order of `names`, the classes of the data set.

    `real` is the measured side of `reference`. Raises UserError for a file of statistics that was made with other
    features.
    """
    headline = network.headline
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
    known, classes, by_class, neighbours, memory = reference.images, [], {}, None, []
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
        memory = memorisation(neighbours.distance, real.held_out_distances, real.view_distances, note=note)
    if n < FEWEST_FOR_FRECHET:
        # the kernel distance, then class consistency, lead
        scores = [*distances[:1], *classes[:1], *memory, *distances[1:], *classes[1:], *neighbourhoods]
    else:
        scores = [*distances, *classes, *memory, *neighbourhoods]
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
        spaces = {origin.space: network.spaces[origin.space]}
    else:
        spaces = network.spaces
    width = len(statistics.mean)
    fitting = next((space for space, own in spaces.items() if own == width), None)
    if fitting is None:
        raise UserError(
            f"{reference.words} are {width} wide, the features {network.name} are "
            f"{' or '.join(map(str, spaces.values()))}. "
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
    images, statistics, warning = against.images, against.statistics, None
    if images is not None and images.size() != size:
        raise UserError(
            f"samples and reference must have one size, got {size} and {images.size()}. Resize one of them."
        )
    if statistics is None:
        return against
    try:
        statistics_space(against, network)
    except UserError:
        if images is None:
            raise
        warning = (
            f"The mu and sigma beside the reference images ({len(statistics.mean)} wide) are of other features than "
            f"{network.name}: every score is measured against the images alone."
        )
        against = replace(against, words=f"{len(images)} images of {images.name}", statistics=None)
    if warning is None and against.origin is None:
        warning = (
            f"The mu and sigma of the reference ({against.words}) do not say of which features they are, so only their "
            "width could be checked. They must be of the very network and preprocessing that this report names."
        )
    return against if warning is None else replace(against, warnings=(*against.warnings, warning))


def distance_scores(samples: Features, real: RealFeatures, network: FeatureNetwork) -> list[Score]:
    """Frechet distances in every space and the kernel distance in the first, which leads below `FEWEST_FOR_FRECHET`."""
    frechet = [_frechet(space, samples[space], real, network) for space in network.spaces]
    kernel = _kernel(network.headline, samples[network.headline], real, network)
    return [kernel, *frechet] if len(real) < FEWEST_FOR_FRECHET else [*frechet, kernel]


def inception_score_list(samples: Features, real: RealFeatures | None, network: FeatureNetwork) -> list[Score]:
    """The Inception score of disjoint splits of the samples; nothing for networks without logits.

    It grows with the size of a split. Beside real images that is theirs, n, so that floor and ceiling compare; without
    them the samples are split into ten, as papers do (of fewer than `_FEWEST_TO_SPLIT` samples there is one split).
    """
    if network.logits is None:
        return []
    rows = samples[network.logits]
    tenth = len(rows) // 10 if len(rows) >= _FEWEST_TO_SPLIT else len(rows)
    size = tenth if real is None else len(real)
    over = Measurements.of([inception_score(rows[chunk]) for chunk in _chunks(len(rows), size)])
    return [
        Score(
            name="Inception score",
            value=over.mean,
            better="higher",
            images=size,
            measurements=over.count,
            deviation=over.deviation,
            floor=None if real is None else inception_score(real.other[network.logits]),
            ceiling=None if real is None else inception_score(real.ruined[network.logits]),
            note=f"splits of {size:,} images: it grows with their size; {_used(over.count * size, len(rows))}",
        )
    ]


def manifold_score_list(samples: Rows, reference: Rows, other: Rows, ruined: Rows, *, space: str) -> list[Score]:
    """Precision, recall, density and coverage in the headline space, over disjoint chunks of the samples.

    Empty where there are too few images for the neighbours that define them; `space` is the name of the features.
    """
    n = len(reference)
    if n < _FEWEST_FOR_MANIFOLD:
        return []
    found = [vars(manifold_scores(samples[rows], reference)) for rows in _chunks(len(samples), n)]
    floor, ceiling = (vars(manifold_scores(rows, reference)) for rows in (other, ruined))
    scores = []
    for name in floor:
        per_chunk = [chunk[name] for chunk in found]
        # recall and coverage are means over the same real images in every chunk
        values = np.concatenate(per_chunk) if name in _SHARES_OF_SAMPLES else np.mean(per_chunk, axis=0)
        # a density of 0 everywhere is no share of images
        interval = bootstrap_interval(values) if name == "density" else mean_interval(values)
        over = Measurements.of([float(chunk.mean()) for chunk in per_chunk])
        scores.append(
            Score(
                name=name,
                value=over.mean,
                better="higher",
                images=n,
                measurements=over.count,
                deviation=over.deviation,
                low=interval.low,
                high=interval.high,
                floor=float(floor[name].mean()),
                ceiling=float(ceiling[name].mean()),
                note=f"features {space}; {_used(over.count * n, len(samples))}",
            )
        )
    return scores


def class_consistency(
    samples: LabelledFeatures,
    training: LabelledFeatures,
    held_out: LabelledFeatures,
    names: Sequence[str],
    *,
    space: str,
) -> tuple[list[Score], dict[str, dict[str, float]]]:
    """Accuracy of two classifiers fitted on training images, and variety within classes; the same by class.

    The floor of an accuracy is that on held-out images, its ceiling chance. `space` is the name of the features.
    """
    scores, by_class = [], {name: {} for name in names}
    for name, kind in (
        ("class accuracy (nearest mean)", NearestClassMean),
        ("class accuracy (linear probe)", LinearProbe),
    ):
        judge = kind.fit(training.rows, training.labels)
        right, right_held_out = (judge.predict(one.rows) == one.labels for one in (samples, held_out))
        scores.append(
            mean_score(
                name,
                mean_interval(right),
                len(right),
                "higher",
                floor=float(right_held_out.mean()),
                ceiling=1 / len(names),
                note=f"floor: {len(right_held_out)} held-out images; ceiling: chance; features {space}",
            )
        )
        for label, share in accuracy_by_class(right, samples.labels).items():
            by_class[names[label]][name] = share
        for label, share in accuracy_by_class(right_held_out, held_out.labels).items():
            by_class[names[label]][f"{name}, held-out images"] = share
    ours, theirs = (intra_class_diversity(one.rows, one.labels) for one in (samples, training))
    ratios = {label: ours[label] / theirs[label] for label in sorted(set(ours) & set(theirs)) if theirs[label] > 0}
    for label, ratio in ratios.items():
        by_class[names[label]]["variety within the class"] = ratio
    if ratios:
        scores.append(
            Score(
                name="variety within classes",
                value=float(np.mean(list(ratios.values()))),
                better="higher",
                images=len(samples.rows),
                floor=1.0,
                ceiling=0.0,
                note="mean distance of two samples of a class over that of two training images; ceiling: all alike; "
                f"features {space}",
            )
        )
    return scores, by_class


def memorisation(
    distances: Float[np.ndarray, " n"],
    held_out: Float[np.ndarray, " k"],
    views: tuple[Float[np.ndarray, " v"], Float[np.ndarray, " w"]] | None,
    *,
    note: str,
) -> list[Score]:
    """Two answers to whether samples lie nearer to training images than held-out images do.

    The memorised share counts samples nearer than 99 % of the held-out images are: single copies, as far as held-out
    images leave room for them. "Nearer than held-out" compares whole laws (`nearer_than`): it also sees copies that a
    crop, a shift or a lossy tokenizer moved away, when there are many.

    Args:
        distances: of every sample to its nearest training image, in the headline space.
        held_out: the same of the held-out images, which nobody copied.
        views: the same of fresh views of training images, which a perfect memory would draw, and of held-out images
            changed alike: the ceiling and the floor. None where they are not known.
        note: what was searched, and what the views are.
    """
    threshold, (copied, new) = copy_distance(held_out), views or (None, None)
    return [
        mean_score(
            "memorised share",
            mean_interval(copies(distances, threshold)),
            len(distances),
            "lower",
            floor=COPY_QUANTILE,
            ceiling=None if copied is None else float(copies(copied, threshold).mean()),
            note="samples nearer to a training image than 99 % of the held-out images are; the ceiling is the share of "
            f"true copies that this finds, before any loss of a tokenizer; {note}",
        ),
        mean_score(
            "nearer than held-out",
            bootstrap_interval(nearer_than(distances, held_out)),
            len(distances),
            "lower",
            floor=0.5 if new is None else float(nearer_than(new, held_out).mean()),
            ceiling=None if copied is None else float(nearer_than(copied, held_out).mean()),
            note="how often a sample is nearer to its nearest training image than a held-out image is to its own; "
            "plain or typical samples are nearer too, so above the floor is a hint, not a proof; floor: held-out "
            "images, ceiling: training images, both as training sees them",
        ),
    ]


def mean_score(name: str, interval: Interval, images: int, better: Literal["lower", "higher"], **others: Any) -> Score:
    """A mean over images with its interval; `others` are further fields of the score."""
    return Score(
        name=name, value=interval.mean, better=better, images=images, low=interval.low, high=interval.high, **others
    )


def _frechet(space: str, rows: Rows, real: RealFeatures, network: FeatureNetwork) -> Score:
    n, reference = len(real), Gaussian.of(real.reference[space])
    over = frechet_over_chunks(rows, reference, chunk_size=n)
    # of the widest features it would take minutes
    single = over.count == 1 and space == network.headline
    return Score(
        name=score_name("frechet", space, n, network.input_size),
        value=over.mean,
        better="lower",
        images=n,
        measurements=over.count,
        deviation=over.deviation,
        error=error_of(frechet_parts(stream(0, SPLIT, 1).permutation(rows)[:n], reference)) if single else None,
        floor=frechet_distance(Gaussian.of(real.other[space]), reference),
        ceiling=frechet_distance(Gaussian.of(real.ruined[space]), reference),
        note=_used(over.count * n, len(rows)),
    )


def _kernel(space: str, rows: Rows, real: RealFeatures, network: FeatureNetwork) -> Score:
    reference = real.reference[space]
    found, floor, ceiling = (kernel_distance(one, reference) for one in (rows, real.other[space], real.ruined[space]))
    return Score(
        name=score_name("kernel", space, len(rows), network.input_size),
        value=found.value,
        better="lower",
        images=found.subset_size,
        measurements=found.num_subsets,
        error=found.standard_error,
        floor=floor.value,
        ceiling=ceiling.value,
        note="unbiased at any n, so it may be a little below 0; " + _used(len(rows), len(rows)),
    )


def _used(used: int, total: int) -> str:
    """What disjoint chunks of one size leave over is said."""
    return f"used {used:,} of {total:,} samples"


def _chunks(total: int, size: int) -> list[Int[np.ndarray, " size"]]:
    """Disjoint chunks of shuffled samples: a file sorted by class gives chunks of all classes."""
    order = stream(0, SPLIT, 1).permutation(total)
    return [order[start : start + size] for start in range(0, total - size + 1, size)]


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
