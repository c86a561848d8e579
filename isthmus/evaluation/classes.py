"""Classes of samples: which class every sample has, which words it is drawn from, and whether samples look their class.

Class and words of a drawn sample are fixed by its number alone, so that any part can be drawn anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from isthmus.errors import UserError
from isthmus.evaluation.statistics import as_double
from isthmus.files import sha256_of_parts
from isthmus.pipelines.labels import names_in_order, resolve_labels

if TYPE_CHECKING:
    from isthmus.evaluation.images import ImageSet
    from isthmus.evaluation.reference import DataSplits
    from isthmus.pipelines.loading import AnyPipeline

EQUAL, AS_IN_DATA, UNKNOWN = "every class equally often", "classes as often as in the data", "unknown (no classes)"
Balance = Literal["uniform", "data"]

_NAMED = 12  # so many classes are named with their share; of more the shares are told apart by a hash
_BLOCK_ROWS = 2048  # in float64 at once: of 2,048 columns they are 32 MiB


def class_balanced_labels(num: int, num_classes: int) -> Int[np.ndarray, " n"]:
    """Classes in turn; all 0 for unlabelled models (`num_classes` 0).

    >>> class_balanced_labels(5, 3).tolist(), class_balanced_labels(2, 0).tolist()
    ([0, 1, 2, 0, 1], [0, 0])
    """
    return np.arange(num, dtype=np.int64) % max(num_classes, 1)


def own_frequency_labels(num: int, counts: Sequence[int] | Int[np.ndarray, " c"]) -> Int[np.ndarray, " n"]:
    """Labels with the frequencies of a data set that has `counts[c]` images of class c.

    Image i takes the class that lags furthest behind its share, so the first i images have the shares as nearly as
    whole numbers can, whatever `num` is.

    >>> own_frequency_labels(6, [1, 2]).tolist()
    [1, 0, 1, 1, 0, 1]
    """
    shares = np.asarray(counts, dtype=np.float64) / np.sum(counts)
    labels, drawn = np.empty(num, dtype=np.int64), np.zeros(len(shares))
    for i in range(num):
        labels[i] = np.argmax(shares * (i + 1) - drawn)
        drawn[labels[i]] += 1
    return labels


def balance_words(
    labels: Int[np.ndarray, " n"] | None, names: Sequence[str], data_counts: Int[np.ndarray, " c"] | None = None
) -> str:
    """How often each class occurs, in words that the frequencies alone decide, whoever drew the images.

    `data_counts` are images of each class in the data set, where there is one.

    >>> balance_words(np.array([0, 1, 0]), ("face", "flag")), balance_words(None, ())
    ('every class equally often', 'unknown (no classes)')
    >>> balance_words(np.array([0, 0, 0, 1]), ("face", "flag")), balance_words(np.array([0, 0]), ("face", "flag"))
    ('face 75 %, flag 25 %', 'face 100 %, flag 0 %')
    """
    if labels is None or not names:
        return UNKNOWN
    found = np.bincount(labels, minlength=len(names))
    if found.max() - found.min() <= 1:
        return EQUAL
    if data_counts is not None:
        expected = np.bincount(own_frequency_labels(len(labels), data_counts), minlength=len(names))
        if np.array_equal(found, expected):
            return AS_IN_DATA
    shares = 100 * found / len(labels)
    if len(names) <= _NAMED:
        return ", ".join(f"{name} {share:.3g} %" for name, share in zip(names, shares, strict=True))
    digest = sha256_of_parts(*(part for pair in zip(names, found.tolist(), strict=True) for part in pair))
    return f"{len(names)} classes, {shares.min():.3g} % to {shares.max():.3g} % each ({digest[:12]})"


@dataclass(frozen=True, eq=False)
class SampleClasses:
    """The class of every sample, and its prompt where the model reads text.

    Attributes:
        labels: class in the order of the data set; all 0 where either side has no classes.
        model_ids: the same as ids of the model; its null id where no class is asked for.
        names: by class of the data set; empty where either side has no classes. The classes of a model of texts are
            those of the images whose captions it is told.
        ids: of the model, by class of the data set; empty where either side has no classes.
        words: the balance, in words.
        rule: what decides the class and the prompt of sample i, however many there are, in JSON values.
        model_names: names of the model's classes by its ids; empty where they have none.
        prompts: one for each sample; empty for models that read no text.
        rows: the held-out image whose caption each prompt is; None for models that read no text.
    """

    labels: Int[np.ndarray, " n"]
    model_ids: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    ids: tuple[int, ...]
    words: str
    rule: dict[str, Any]
    model_names: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    rows: Int[np.ndarray, " n"] | None = None


def choose_classes(pipeline: "AnyPipeline", data: "DataSplits", num: int, balance: Balance) -> SampleClasses:
    """The class of samples 0..num - 1, fixed by their numbers; of a model that reads text their prompts too.

    A prompt is the caption of a held-out image of the sample's class, all of them in turn; classes of which no held-out
    image has a caption are left out then.

    Raises:
        UserError: the classes of the data are not those of the model, frequencies are asked for and there are none, or
            a model that reads text is judged on data without captions.
    """
    names, nothing, model_names = data.class_names, np.zeros(num, np.int64), names_in_order(pipeline.class_names)
    if balance == "data" and not names:
        raise UserError(f"{data.spec} is unlabelled, so it has no class frequencies. Leave out --balance data.")
    if pipeline.reads_text:
        return _with_captions(pipeline, data, num, balance)
    if balance == "data" and pipeline.num_classes == 0:
        raise UserError(
            "the model is unlabelled, so it cannot draw classes as often as in the data. Leave out --balance data."
        )
    if pipeline.num_classes == 0:
        return SampleClasses(nothing, nothing, (), (), UNKNOWN, {"class_ids": []}, ())
    if not names:
        labels, ids = class_balanced_labels(num, pipeline.num_classes), list(range(pipeline.num_classes))
        words = balance_words(labels, model_names or list(map(str, ids)))
        return SampleClasses(nothing, labels, (), (), words, {"class_ids": ids}, model_names)
    ids, rule = _ids_and_rule(pipeline, names)
    counts = data.class_counts()
    if balance == "uniform":
        labels = class_balanced_labels(num, len(names))
    else:
        labels = own_frequency_labels(num, counts)
        rule["class_counts"] = counts.tolist()
    words, model_ids = balance_words(labels, names, counts), np.array(ids, np.int64)[labels]
    return SampleClasses(labels, model_ids, names, tuple(ids), words, rule, model_names or names)


def _ids_and_rule(pipeline: "AnyPipeline", names: Sequence[str]) -> tuple[list[int], dict[str, Any]]:
    """The model's ids of the classes of the data, and the start of the rule; UserError where they do not match."""
    if pipeline.class_names:
        ids = resolve_labels(names, class_names=pipeline.class_names, num_classes=pipeline.num_classes)
        return ids, {"class_ids": ids}
    if len(names) == pipeline.num_classes:
        # it is given data with as many classes, in its own order
        ids = list(range(len(names)))
        return ids, {"class_ids": ids, "class_names": list(names)}
    raise UserError(
        f"the model's {pipeline.num_classes} classes have no names, so the data must have as many, got "
        f"{len(names)}. Pass the data it was trained on."
    )


def _with_captions(pipeline: "AnyPipeline", data: "DataSplits", num: int, balance: Balance) -> SampleClasses:
    """Classes and prompts of a model that reads text, whether or not it knows classes too."""
    held_out, names = data.held_out, data.class_names
    captions = held_out.captions or ()
    told = np.array([bool(caption) for caption in captions], bool)
    if not told.any():
        of = "none" if held_out.captions is None else "none of its held-out images has any"
        raise UserError(
            f"a model that reads text is judged on images with captions, {data.spec} has {of}. Use avatars, write a "
            ".txt beside each image, or name a --caption-column."
        )
    of_images = held_out.labels if names and held_out.labels is not None else np.zeros(len(captions), np.int64)
    ids, matched = _ids_and_rule(pipeline, names) if names and pipeline.num_classes else ([], {"class_ids": []})
    rule: dict[str, Any] = {**matched, "captions": held_out.fingerprint}
    # classes without words cannot be asked for
    there = np.bincount(of_images[told], minlength=max(len(names), 1)) > 0
    counts = data.class_counts() if names else None
    if balance == "uniform" or counts is None:
        labels = np.flatnonzero(there)[class_balanced_labels(num, int(there.sum()))]
    else:
        labels = own_frequency_labels(num, counts * there)
        rule["class_counts"] = (counts * there).tolist()
    rows = images_in_turn(labels, np.where(told, of_images, -1))
    words = balance_words(labels, names, counts) if names else UNKNOWN
    model_ids = np.array(ids, np.int64)[labels] if ids else np.full(num, pipeline.num_classes, np.int64)
    model_names = names_in_order(pipeline.class_names) or (names if ids else ())
    prompts = tuple(captions[int(row)] for row in rows)
    return SampleClasses(labels, model_ids, names, tuple(ids), words, rule, model_names, prompts, rows)


def images_in_turn(labels: Int[np.ndarray, " n"], of_images: Int[np.ndarray, " k"]) -> Int[np.ndarray, " n"]:
    """For each label the number of an image that has it: all images of a label in turn, over and over.

    >>> images_in_turn(np.array([0, 1, 0, 0]), np.array([1, 0, 0, 1])).tolist()
    [1, 0, 2, 1]
    """
    rows = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        rows[places] = np.resize(np.flatnonzero(of_images == label), len(places))
    return rows


def others_of_their_class(labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """For each image the number of another one, of its class where every class has two: each is another's once.

    >>> others_of_their_class(np.array([0, 1, 0, 1])).tolist(), others_of_their_class(np.array([0, 1, 2])).tolist()
    ([2, 3, 0, 1], [1, 2, 0])
    """
    if np.unique(labels, return_counts=True)[1].min() < 2:
        labels = np.zeros_like(labels)
    others = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # half way around: images that lie side by side may be alike
        others[members] = np.roll(members, -(len(members) // 2))
    return others


@dataclass(frozen=True, eq=False)
class MatchedClasses:
    """Classes of images from elsewhere, as far as they are known.

    Attributes:
        labels: in the order of the data set; None where they cannot be told.
        names: classes of the data set; empty where labels cannot be told.
        words: the balance, in words.
        warning: why class scores are left out, or None.
    """

    labels: Int[np.ndarray, " n"] | None
    names: tuple[str, ...]
    words: str
    warning: str | None = None


def matched_classes(images: "ImageSet", data: "DataSplits | None") -> MatchedClasses:
    """Classes by their names alone: a number says nothing about the order of the classes in another place."""
    if images.labels is None:
        return MatchedClasses(None, (), UNKNOWN)
    used = np.unique(images.labels)
    unmatched = balance_words(images.labels, images.class_names or tuple(map(str, range(int(used[-1]) + 1))))
    if data is None or not data.class_names:
        return MatchedClasses(None, (), unmatched)
    names = data.class_names
    if not images.class_names:
        what = f"labels without names, which cannot be matched with the classes of {data.spec}"
    elif absent := [name for name in (images.class_names[label] for label in used) if name not in names]:
        what = f"the class {absent[0]}, which {data.spec} has not"
    else:
        places = np.array([names.index(name) if name in names else -1 for name in images.class_names])
        labels = places[images.labels]
        return MatchedClasses(labels, names, balance_words(labels, names, data.class_counts()))
    warning = f"The samples have {what}: class scores are left out."
    if len(used) == 1:
        warning += " All samples have one label: a reference of several classes is far from them for that alone."
    return MatchedClasses(None, (), unmatched, warning)


@dataclass(frozen=True, eq=False)
class NearestClassMean:
    """A classifier that is nothing but one mean per class: the class whose mean is nearest (Euclidean) wins."""

    classes: Int[np.ndarray, " c"]
    means: Float[np.ndarray, "c d"]

    @classmethod
    def fit(cls, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> "NearestClassMean":
        """Average the training features of every class that occurs. Raises UserError where there is no image."""
        classes, index = _classes_of(labels)
        sums = np.stack([features[index == i].sum(axis=0, dtype=np.float64) for i in range(len(classes))])
        return cls(classes, sums / np.bincount(index)[:, None])

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """Label of the nearest mean for every row."""
        means = as_double(self.means)
        blocks = (torch.cdist(as_double(rows), means).argmin(dim=1).numpy() for rows in _blocks(features))
        return self.classes[np.concatenate([*blocks])]


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Ridge regression of centred, scaled features on one column per class; the largest column wins.

    The closed form has no step size, no seed and one answer (Hoerl and Kennard 1970).
    """

    classes: Int[np.ndarray, " c"]
    mean: Float[np.ndarray, " d"]
    weights: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]

    @classmethod
    def fit(
        cls, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, ridge: float = 0.1
    ) -> "LinearProbe":
        """Fit on training features; `ridge` is the penalty as a share of the mean variance of a feature, times n.

        Raises:
            UserError: there is no image, or `ridge` is not positive.
        """
        classes, index = _classes_of(labels)
        if ridge <= 0:
            raise UserError(f"ridge must be positive, got {ridge}. 0.1 is usual.")
        targets = np.eye(len(classes))[index]
        mean, bias = features.mean(axis=0, dtype=np.float64), targets.mean(axis=0)
        width = features.shape[1]
        scatter, products = np.zeros((width, width)), np.zeros((width, len(classes)))
        for rows, wanted in zip(_blocks(features), _blocks(targets - bias), strict=True):
            centred = np.asarray(rows, np.float64) - mean
            scatter += centred.T @ centred
            products += centred.T @ wanted
        scatter[np.diag_indices(width)] += ridge * max(np.trace(scatter) / width, np.finfo(np.float64).tiny)
        return cls(classes, mean, np.linalg.solve(scatter, products), bias)

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """Most likely label for every row."""
        blocks = (((rows - self.mean) @ self.weights + self.bias).argmax(axis=1) for rows in _blocks(features))
        return self.classes[np.concatenate([*blocks])]


def accuracy_by_class(right: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[int, float]:
    """Share of right answers for every label that occurs.

    >>> accuracy_by_class(np.array([True, False, True]), np.array([4, 4, 1]))
    {1: 1.0, 4: 0.5}
    """
    return {int(label): float(right[labels == label].mean()) for label in np.unique(labels)}


def intra_class_diversity(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> dict[int, float]:
    """Mean Euclidean distance of two different images of a class, for every label with at least two of them.

    >>> intra_class_diversity(np.array([[0.0], [3.0], [6.0], [9.0]]), np.array([0, 0, 0, 1]))
    {0: 4.0}
    """
    found = {}
    for label in np.unique(labels):
        rows = features[labels == label]
        if len(rows) > 1:
            found[int(label)] = _mean_pair_distance(rows)
    return found


def inception_score(logits: Float[np.ndarray, "n v"]) -> float:
    """The exponential of the mean KL divergence of p(class | image) from its mean over the images.

    Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4. Meant for the logits of
    Inception-v3, 1 (useless) to the number of classes. It grows with the number of images and needs all classes among
    them: measure shuffled sets of one size, at least one image.
    """
    total, sums = 0.0, torch.zeros(logits.shape[1], dtype=torch.float64)
    for rows in _blocks(logits):
        log_given = torch.log_softmax(as_double(rows), dim=1)
        given = log_given.exp()
        total += float((given * log_given).sum())
        sums += given.sum(dim=0)
    mean = sums / len(logits)
    # the mean of sum p (log p - log mean), its two sums apart
    return float(np.exp(total / len(logits) - float(torch.xlogy(mean, mean).sum())))


def _mean_pair_distance(rows: Float[np.ndarray, "n d"]) -> float:
    pairs = ((as_double(ours), as_double(others)) for ours in _blocks(rows) for others in _blocks(rows))
    total = sum(float(torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist").sum()) for pair in pairs)
    return total / (len(rows) * (len(rows) - 1))


def _classes_of(labels: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " n"]]:
    """The labels that occur, and the place of every label among them."""
    if not len(labels):
        raise UserError("fitting classes needs at least one labelled image, got none. Pass the training features.")
    classes, index = np.unique(labels, return_inverse=True)
    return classes, index


def _blocks(rows: Float[np.ndarray, "n d"]) -> Iterator[Float[np.ndarray, "_ d"]]:
    return (rows[start : start + _BLOCK_ROWS] for start in range(0, max(len(rows), 1), _BLOCK_ROWS))
