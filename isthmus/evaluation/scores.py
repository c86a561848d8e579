"""Scores of generated images from features alone: pure functions, every distance beside its floor and its ceiling."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from isthmus.evaluation.classes import (
    LinearProbe,
    NearestClassMean,
    accuracy_by_class,
    inception_score,
    intra_class_diversity,
)
from isthmus.evaluation.features import FeatureNetwork, score_name
from isthmus.evaluation.guards import FEWEST_FOR_FRECHET
from isthmus.evaluation.neighbours import COPY_QUANTILE, copies, copy_distance, manifold_scores, nearer_than
from isthmus.evaluation.record import Score
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
from isthmus.nn.draws import SPLIT, stream

Rows = Float[np.ndarray, "_ d"]
Features = dict[str, Float[np.ndarray, "_ _"]]

_FEWEST_FOR_MANIFOLD = 6  # the fifth neighbour of an image
_FEWEST_TO_SPLIT = 100  # ten images say nothing of classes
_SHARES_OF_SAMPLES = ("precision", "density")  # recall and coverage are means over the real images


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """Features by space of n real images each.

    Attributes:
        reference: what samples are measured against.
        other: disjoint from it; its score is the floor.
        ruined: `other`, of which mean colour and blur are left; its score is the ceiling.
    """

    reference: Features
    other: Features
    ruined: Features

    def __len__(self) -> int:
        return len(next(iter(self.reference.values())))


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Features in the headline space with their classes."""

    rows: Rows
    labels: Int[np.ndarray, " n"]


def distance_scores(samples: Features, real: RealFeatures, network: FeatureNetwork) -> list[Score]:
    """Frechet distances in every space and the kernel distance in the first, which leads below `FEWEST_FOR_FRECHET`."""
    headline = next(iter(network.spaces))
    frechet = [_frechet(space, samples[space], real, network) for space in network.spaces]
    kernel = _kernel(headline, samples[headline], real, network)
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
    return Score(
        name=score_name("frechet", space, n, network.input_size),
        value=over.mean,
        better="lower",
        images=n,
        measurements=over.count,
        deviation=over.deviation,
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
