"""The real images of an evaluation, measured once: reference, its disjoint other half, training and held-out images."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from isthmus.data.opening import BUILT_IN, class_names, open_source, parse_spec
from isthmus.data.source import ANY_COLUMNS, ImageSource, WantedColumns
from isthmus.data.views import random_view
from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import StatisticsOrigin, kind_of_npz, read_statistics
from isthmus.evaluation.features import FeatureNetwork, Features, Rows, extract_features
from isthmus.evaluation.guards import check_reference, check_value_range, pixel_digest
from isthmus.evaluation.images import ImageSet, Picture, joined, local_path, open_images, real_images, ruined, some
from isthmus.evaluation.neighbours import nearest_neighbours
from isthmus.evaluation.statistics import Gaussian
from isthmus.files import sha256_of_file
from isthmus.nn.draws import AUGMENT, SPLIT, stream

TRAINING_LIMIT = 50_000
"""Training images that are measured (class means, nearest neighbours); of larger sets evenly spread ones are taken."""

MOST_FRESH = 10_000
"""n, at most, where the real images of an evaluation are drawn for it."""

# marks the streams of views: training's own have one number after the purpose
_MEASURED = 1


def images_per_measurement(num_samples: int, num_real: int) -> int:
    """n: the size at which floor, ceiling and score are all computed, min(N, half the real images)."""
    n = min(num_samples, num_real // 2)
    if n < 2:
        raise UserError(
            f"a comparison needs at least 2 samples and 4 real images, got {num_samples} and {num_real}. Pass more."
        )
    return n


def disjoint_halves(
    labels: Int[np.ndarray, " n"], size: int
) -> tuple[Int[np.ndarray, " size"], Int[np.ndarray, " size"]]:
    """Indices of two disjoint sets of `size` images (half of all at most), both with the class frequencies of all.

    Fixed by the labels. Unlabelled images have one label.
    """
    generator, dealt = stream(0, SPLIT), 0
    sides, places = np.empty(len(labels), np.int64), np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        # dealt out like cards; where in its class an image stands orders each half, so that any first part is mixed
        sides[members] = (dealt + np.arange(len(members))) % 2
        places[members] = (np.arange(len(members)) + 0.5) / len(members)
        dealt += len(members)
    order = np.argsort(places, kind="stable")
    first, second = (order[sides[order] == side][:size] for side in (0, 1))
    return first, second


def training_views(source: ImageSource, image_size: int, count: int, *, seed: int = 0) -> ImageSet:
    """`count` fresh views of images that are evenly spread over the split, as training would see them.

    View k is drawn from (seed, k); an image is seen again where there are more views than images.
    """
    chosen = np.arange(count) * len(source) // count

    def at(index: int) -> Picture:
        generator = stream(seed, AUGMENT, index, _MEASURED)
        return random_view(source, int(chosen[index]), image_size, source.augmentation, generator)

    return ImageSet("views", "", None, (), count, at=at)


def view_words(source: ImageSource) -> str:
    """What training does to the images of a split, in words."""
    augment, done = source.augmentation, []
    if type(source).draw is not ImageSource.draw:
        done.append("cut afresh")
    if augment.resize_ratio > 1:
        done.append("cropped")
    if augment.max_shift > 0:
        done.append("shifted")
    if augment.flip and bool(source.flip.any()):
        done.append("mirrored")
    listed = " and ".join(filter(None, (", ".join(done[:-1]), *done[-1:])))
    return "training images as training sees them" + (f", {listed}" if listed else "")


@dataclass(frozen=True)
class DataSplits:
    """The data set of a model, as it is evaluated.

    Attributes:
        spec: as in --data.
        built_in: whether it comes with the package.
        train: training images, at most `TRAINING_LIMIT` of them.
        num_train: training images in all.
        attribution: licence line.
        sources: both splits as training reads them; None where that is not known.
        fresh: images of data without end that are neither trained on nor held out: a reference and as many again.
    """

    spec: str
    built_in: bool
    train: ImageSet
    held_out: ImageSet
    num_train: int
    attribution: str
    sources: tuple[ImageSource, ImageSource] | None = None
    fresh: ImageSet | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty where the data are unlabelled."""
        return self.train.class_names

    def class_counts(self) -> Int[np.ndarray, " c"]:
        """Images of each class, all training and held-out ones together."""
        training = self.train.labels if self.sources is None else self.sources[0].labels
        known = [labels for labels in (training, self.held_out.labels) if labels is not None]
        return np.bincount(np.concatenate(known), minlength=len(self.class_names))


@dataclass(frozen=True)
class Reference:
    """What samples are measured against: images, a file of statistics, or a file that holds both.

    Attributes:
        words: what it is.
        fingerprint: SHA-256 (hex) of its contents.
        images: None for a file of statistics alone.
        statistics: of such a file; beside images they are of the whole set the images are from.
        holds_training: whether it is training and held-out images of a built-in set together.
        warnings: what a report should say of it.
        origin: which features the statistics are of; None where the file does not say.
    """

    words: str
    fingerprint: str
    images: ImageSet | None
    statistics: Gaussian | None = None
    holds_training: bool = False
    warnings: tuple[str, ...] = ()
    origin: StatisticsOrigin | None = None

    def images_per_measurement(self, num_samples: int) -> int:
        """n; all samples where the reference is a file of statistics."""
        return num_samples if self.images is None else images_per_measurement(num_samples, len(self.images))


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


@dataclass(frozen=True, eq=False)
class RealSide:
    """Measured real images.

    Attributes:
        reference: features of the two halves; None where the reference is a file of statistics.
        training: in the headline space; None, as `held_out`, without a data set.
        warnings: of the guards.
        views: features in the headline space of fresh views, as training sees images, of training and of held-out ones.
        searched: which training images copies are looked for among, and what the views are, in words.
    """

    reference: RealFeatures | None
    training: LabelledFeatures | None
    held_out: LabelledFeatures | None
    warnings: tuple[str, ...]
    views: tuple[Rows, Rows] | None = None
    searched: str = ""

    @cached_property
    def held_out_distances(self) -> Float[np.ndarray, " k"]:
        """Of every held-out image to its nearest training image; where there is a data set."""
        assert self.training is not None and self.held_out is not None, "only where there is a data set"
        return nearest_neighbours(self.held_out.rows, self.training.rows)[1]

    @cached_property
    def view_distances(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " m"]] | None:
        """The same of both sets of `views`: what copies and what new images would have."""
        if self.views is None or self.training is None:
            return None
        copied, new = (nearest_neighbours(rows, self.training.rows)[1] for rows in self.views)
        return copied, new


def open_splits(
    spec: str,
    *,
    image_size: int,
    classes: tuple[str, ...],
    wanted: tuple[str, ...],
    columns: WantedColumns = ANY_COLUMNS,
    max_images: int | None = None,
    num_samples: int = 0,
) -> DataSplits:
    """Both splits of a data set at `image_size` pixels; arguments without words are those of `open_source`.

    Args:
        classes: those asked for, in this order; none are those of the model.
        num_samples: that will be measured: of data without end, twice as many fresh images are drawn (`MOST_FRESH`).
        wanted: names of the model's classes, which the data set must have where `classes` names none.

    Raises:
        UserError: the data cannot be used, or do not have the model's classes.
    """
    chosen = classes or None
    if chosen is None and wanted:
        there = class_names(spec, image_size=image_size, columns=columns)
        absent = [name for name in wanted if name not in there]
        if there and absent:
            raise UserError(
                f"the model draws {', '.join(wanted)}, but {spec} has no {absent[0]}. "
                "Pass the data it was trained on, or name the classes both have with --classes."
            )
        chosen = wanted if there else None
    train, held_out = (
        open_source(spec, image_size=image_size, split=split, classes=chosen, columns=columns, max_images=max_images)
        for split in ("train", "val")
    )
    kind, fresh = parse_spec(spec)[0], None
    if kind == "avatars" and num_samples:
        wanted_images = max(2 * min(num_samples, MOST_FRESH), len(train.class_names))
        source = open_source(
            spec, image_size=image_size, split="reference", classes=train.class_names, max_images=wanted_images
        )
        fresh = real_images(source, image_size)
    return DataSplits(
        spec,
        kind in BUILT_IN,
        some(real_images(train, image_size), TRAINING_LIMIT),
        real_images(held_out, image_size),
        len(train),
        train.attribution,
        (train, held_out),
        fresh,
    )


def choose_reference(data: DataSplits | None, path: Path | None, *, size: tuple[int, int]) -> Reference:
    """The reference of an evaluation: images or statistics at `path`, else images of the data set.

    Of data without end it is fresh ones, which nobody trained on; of other built-in sets, some of which are small,
    training and held-out images together; of other data the held-out part.

    Args:
        size: of the samples, height and width in pixels.

    Raises:
        UserError: there is neither, or it cannot be read.
    """
    if path is not None:
        path = local_path(path)
        kind = kind_of_npz(path) if path.is_file() else "images"
        statistics, origin = None, None
        if kind != "images":
            mean, covariance, origin = read_statistics(path)
            statistics = Gaussian.from_covariance(mean, covariance)
        if kind == "statistics":
            return Reference(f"the statistics in {path.name}", sha256_of_file(path), None, statistics, origin=origin)
        images = open_images(path, size=size)
        words = f"{len(images)} images of {images.name}"
        if statistics is not None:
            words += ", and its mu and sigma for the Frechet distance"
        return Reference(words, images.fingerprint, images, statistics, origin=origin)
    if data is None:
        raise UserError("samples need something to be measured against, got no --reference and no --data. Pass one.")
    if data.fresh is not None:
        words = f"{len(data.fresh)} fresh images of {data.spec}"
        return Reference(words, data.fresh.fingerprint, data.fresh)
    if data.built_in:
        images = joined((data.train, data.held_out), data.spec)
        words = f"{len(data.train)} training and {len(data.held_out)} held-out images of {data.spec}"
        return Reference(words, images.fingerprint, images, holds_training=True)
    words = f"{len(data.held_out)} held-out images of {data.spec}"
    return Reference(words, data.held_out.fingerprint, data.held_out)


def measure_real_side(reference: Reference, data: DataSplits | None, network: FeatureNetwork, n: int) -> RealSide:
    """Features of all real images; `n` of the reference on each side of the comparison.

    Raises:
        UserError: the reference is the training set, or its images cannot be used.
    """
    sets = [_measured(data.train, network), _measured(data.held_out, network)] if data is not None else []
    real, warnings = None, list(reference.warnings)
    if reference.images is not None:
        if reference.holds_training:
            features = {name: np.concatenate([found[name] for found, _ in sets]) for name in sets[0][0]}
            digests = sets[0][1] + sets[1][1]
        elif data is not None and reference.images is data.held_out:
            features, digests = sets[1]
        else:
            features, digests = _measured(reference.images, network)
        real = _halves(reference.images, features, network, n)
        if data is not None:
            looked_at = len(data.train) / data.num_train
            built_in = reference.holds_training
            warning = check_reference(digests, sets[0][1], built_in=built_in, looked_at=looked_at)
            warnings += [] if warning is None else [warning]
    if data is None:
        return RealSide(real, None, None, tuple(warnings))
    training, held_out = (
        LabelledFeatures(found[network.headline], _labels(images))
        for images, (found, _) in zip((data.train, data.held_out), sets, strict=True)
    )
    views = None
    if data.sources is not None:
        side, _ = data.train.size()
        drawn = (training_views(source, side, n).shown("views") for source in data.sources)
        copied, new = (extract_features(network, images)[network.headline] for images in drawn)
        views = copied, new
    return RealSide(real, training, held_out, tuple(warnings), views, _searched(data))


def _measured(images: ImageSet, network: FeatureNetwork) -> tuple[Features, list[str]]:
    """Features and `pixel_digest`s, in one reading."""
    digests: list[str] = []

    def noted() -> Iterator[Picture]:
        for image in images.shown("real images"):
            digests.append(pixel_digest(image))
            yield image

    check_value_range(images)
    return extract_features(network, noted()), digests


def _searched(data: DataSplits) -> str:
    share = len(data.train) / data.num_train
    words = f"searched {len(data.train):,} of {data.num_train:,} training images"
    words += "" if share == 1 else f" ({100 * share:.3g} %; copies of the others are not seen)"
    return words + " by their central squares" + (f"; ceiling: {view_words(data.sources[0])}" if data.sources else "")


def _labels(images: ImageSet) -> Int[np.ndarray, " n"]:
    return np.zeros(len(images), np.int64) if images.labels is None else images.labels


def _halves(images: ImageSet, features: Features, network: FeatureNetwork, n: int) -> RealFeatures:
    first, second = disjoint_halves(_labels(images), n)
    wanted = set(second.tolist())
    other = (image for i, image in enumerate(images.shown("ruined images")) if i in wanted)
    return RealFeatures(
        {space: rows[first] for space, rows in features.items()},
        {space: rows[second] for space, rows in features.items()},
        extract_features(network, ruined(other)),
    )
