"""Classes of samples: which class every sample has, and whether samples look like it.

The class of a sample is fixed by its number alone, so that any part can be drawn anywhere. Class consistency judges
samples with a classifier fitted on training features. Its accuracy on held-out real images stands beside it as the
`floor`, as the score of real images does beside every distance, and chance as the `ceiling`. Inception score for those
who ask for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.files import sha256_of_parts
from isthmus.pipelines.labels import names_in_order, resolve_labels

if TYPE_CHECKING:
    from isthmus.evaluation.reference import DataSplits
    from isthmus.pipelines.loading import AnyPipeline

EQUAL, AS_IN_DATA, UNKNOWN = "every class equally often", "classes as often as in the data", "unknown (no classes)"

_NAMED = 12  # so many classes are named with their share; of more the shares are told apart by a hash


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

    Raises:
        UserError: there is no image to count.

    >>> own_frequency_labels(6, [1, 2]).tolist()
    [1, 0, 1, 1, 0, 1]
    """
    shares = np.asarray(counts, dtype=np.float64)
    if shares.ndim != 1 or not shares.sum() > 0 or shares.min() < 0:
        raise UserError(f"frequencies of classes need at least one image, got the counts {list(counts)}. Pass others.")
    shares = shares / shares.sum()
    labels, drawn = np.empty(num, dtype=np.int64), np.zeros(len(shares))
    for i in range(num):
        labels[i] = np.argmax(shares * (i + 1) - drawn)
        drawn[labels[i]] += 1
    return labels


def balance_words(
    labels: Int[np.ndarray, " n"] | None, names: Sequence[str], data_counts: Int[np.ndarray, " c"] | None = None
) -> str:
    """How often each class occurs, in words that the frequencies alone decide, whoever drew the images.

    Args:
        labels: of the images; None where they have none.
        names: by label.
        data_counts: images of each class in the data set, where there is one.

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


Balance = Literal["uniform", "data"]


@dataclass(frozen=True, eq=False)
class SampleClasses:
    """The class of every sample.

    Attributes:
        labels: class in the order of the data set; all 0 where either side has no classes.
        model_ids: the same as ids of the model; its null id where no class is asked for.
        names: by class of the data set; empty where either side has no classes.
        ids: of the model, by class of the data set; empty likewise.
        words: the balance, in words.
        rule: what decides the class of sample i, however many there are, in JSON values.
        model_names: names of the model's classes by its ids; empty where they have none.
    """

    labels: Int[np.ndarray, " n"]
    model_ids: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    ids: tuple[int, ...]
    words: str
    rule: dict[str, Any]
    model_names: tuple[str, ...]


def choose_classes(pipeline: "AnyPipeline", data: "DataSplits", num: int, balance: Balance) -> SampleClasses:
    """The class of samples 0..num - 1, fixed by their numbers.

    Raises:
        UserError: the classes of the data are not those of the model, or frequencies are asked for and there are none.
    """
    names, nothing = data.class_names, np.zeros(num, np.int64)
    model_names = names_in_order(pipeline.class_names)
    if balance == "data" and not names:
        raise UserError(f"{data.spec} is unlabelled, so it has no class frequencies. Leave out --balance data.")
    if pipeline.num_classes == 0:
        if balance == "data":
            raise UserError(
                "the model is unlabelled, so it cannot draw classes as often as in the data. Leave out --balance data."
            )
        return SampleClasses(nothing, nothing, (), (), balance_words(None, ()), {"class_ids": []}, ())
    if not names:
        labels, ids = class_balanced_labels(num, pipeline.num_classes), list(range(pipeline.num_classes))
        words = balance_words(labels, model_names or list(map(str, ids)))
        return SampleClasses(nothing, labels, (), (), words, {"class_ids": ids}, model_names)
    if pipeline.class_names:
        ids = resolve_labels(names, class_names=pipeline.class_names, num_classes=pipeline.num_classes)
    elif len(names) == pipeline.num_classes:
        ids = list(range(len(names)))
    else:
        raise UserError(
            f"the model's {pipeline.num_classes} classes have no names, so the data must have as many, got "
            f"{len(names)}. Pass the data it was trained on."
        )
    counts = data.class_counts()
    rule: dict[str, Any] = {"class_ids": list(ids)}
    if not model_names:
        # it is given data with as many classes, in its own order
        rule["class_names"] = list(names)
    if balance == "uniform":
        labels = class_balanced_labels(num, len(names))
    else:
        labels = own_frequency_labels(num, counts)
        rule["class_counts"] = counts.tolist()
    words = balance_words(labels, names, counts)
    model_ids = np.array(ids, np.int64)[labels]
    return SampleClasses(labels, model_ids, names, tuple(ids), words, rule, model_names or names)


# rows in float64 at once: 2,048 of 2,048 columns are 32 MiB
_BLOCK_ROWS = 2048

_NO_IMAGE = "fitting classes needs at least one labelled image, got none. Pass the training features."


@dataclass(frozen=True, eq=False)
class NearestClassMean:
    """A classifier that is nothing but one mean per class: the class whose mean is nearest (Euclidean) wins."""

    classes: Int[np.ndarray, " c"]
    means: Float[np.ndarray, "c d"]

    @classmethod
    def fit(cls, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> "NearestClassMean":
        """Average the training features of every class that occurs. Raises `UserError` when there is no image."""
        if not len(labels):
            raise UserError(_NO_IMAGE)
        classes, index = np.unique(labels, return_inverse=True)
        sums = np.stack([features[index == i].sum(axis=0, dtype=np.float64) for i in range(len(classes))])
        return cls(classes, sums / np.bincount(index)[:, None])

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """Label of the nearest mean for every row."""
        means, found = _double(self.means), np.empty(len(features), self.classes.dtype)
        for start in range(0, len(features), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            found[rows] = self.classes[torch.cdist(_double(features[rows]), means).argmin(dim=1).numpy()]
        return found

    def accuracy(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
        """Share in [0, 1] of rows whose nearest mean is that of their label; a label never seen counts as wrong."""
        return _share(self.predict(features) == labels)


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
        if not len(labels):
            raise UserError(_NO_IMAGE)
        if ridge <= 0:
            raise UserError(f"ridge must be positive, got {ridge}. 0.1 is usual.")
        classes, index = np.unique(labels, return_inverse=True)
        targets = np.eye(len(classes))[index]
        mean, bias = features.mean(axis=0, dtype=np.float64), targets.mean(axis=0)
        count, width = features.shape
        if count < width:
            rows = np.asarray(features, np.float64) - mean
            # the same weights from the n x n system
            small = rows @ rows.T + _penalty(ridge, float(np.square(rows).sum()), width) * np.eye(count)
            return cls(classes, mean, rows.T @ np.linalg.solve(small, targets - bias), bias)
        scatter, products = np.zeros((width, width)), np.zeros((width, len(classes)))
        for start in range(0, count, _BLOCK_ROWS):
            block = np.asarray(features[start : start + _BLOCK_ROWS], np.float64) - mean
            scatter += block.T @ block
            products += block.T @ (targets[start : start + _BLOCK_ROWS] - bias)
        scatter[np.diag_indices(width)] += _penalty(ridge, float(np.trace(scatter)), width)
        return cls(classes, mean, np.linalg.solve(scatter, products), bias)

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """Most likely label for every row."""
        found = np.empty(len(features), self.classes.dtype)
        for start in range(0, len(features), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            found[rows] = self.classes[((features[rows] - self.mean) @ self.weights + self.bias).argmax(axis=1)]
        return found

    def accuracy(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
        """Share in [0, 1] of rows that are given their label; a label never seen counts as wrong."""
        return _share(self.predict(features) == labels)


def accuracy_by_class(right: Bool[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> dict[int, float]:
    """Share of right answers for every label that occurs.

    >>> accuracy_by_class(np.array([True, False, True]), np.array([4, 4, 1]))
    {1: 1.0, 4: 0.5}
    """
    return {int(label): float(right[labels == label].mean()) for label in np.unique(labels)}


def intra_class_diversity(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> dict[int, float]:
    """Mean Euclidean distance of two different images of a class, for every label with at least two of them.

    Over that of real images it says how much of their variety the samples have: 1 is as varied, 0 all alike.

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
    them: measure shuffled sets of one size.

    Raises:
        UserError: there is no image.
    """
    if not len(logits):
        raise UserError("an Inception score needs at least one image, got none. Pass logits of samples.")
    total, sums = 0.0, torch.zeros(logits.shape[1], dtype=torch.float64)
    for start in range(0, len(logits), _BLOCK_ROWS):
        log_given = torch.log_softmax(_double(logits[start : start + _BLOCK_ROWS]), dim=1)
        given = log_given.exp()
        total += float((given * log_given).sum())
        sums += given.sum(dim=0)
    mean = sums / len(logits)
    # the mean of sum p (log p - log mean), its two sums apart
    return float(np.exp(total / len(logits) - float(torch.xlogy(mean, mean).sum())))


def _penalty(ridge: float, scatter: float, width: int) -> float:
    """`ridge` times n times the mean variance of a feature, from the sum of squares of all centred features."""
    return ridge * max(scatter / width, np.finfo(np.float64).tiny)


def _mean_pair_distance(rows: Float[np.ndarray, "n d"]) -> float:
    total, starts = 0.0, range(0, len(rows), _BLOCK_ROWS)
    for here in starts:
        block = _double(rows[here : here + _BLOCK_ROWS])
        for there in starts:
            others = _double(rows[there : there + _BLOCK_ROWS])
            total += float(torch.cdist(block, others, compute_mode="donot_use_mm_for_euclid_dist").sum())
    return total / (len(rows) * (len(rows) - 1))


def _share(right: Bool[np.ndarray, " n"]) -> float:
    if not len(right):
        raise UserError("accuracy needs at least one image, got none. Pass features of samples or held-out images.")
    return float(right.mean())


def _double(array: np.ndarray) -> Tensor:
    # copied: torch takes no array that is read backwards or may not be written to
    return torch.from_numpy(np.array(array, dtype=np.float64))
