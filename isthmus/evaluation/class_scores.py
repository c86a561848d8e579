"""Do samples look like their class, and do they differ within it? Inception score for those who ask for it.

Class consistency judges samples with a classifier fitted on training features; its accuracy on held-out real images is
the ceiling that stands beside it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError

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
        sums = np.zeros((len(classes), features.shape[1]))
        np.add.at(sums, index, features)
        return cls(classes, sums / np.bincount(index)[:, None])

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """Label of the nearest mean for every row."""
        distances = torch.cdist(_double(features), _double(self.means))
        return self.classes[distances.argmin(dim=1).numpy()]

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
        rows = np.asarray(features, np.float64) - mean
        penalty = ridge * max(float(rows.var(axis=0).mean()), np.finfo(np.float64).tiny) * len(rows)
        if len(rows) < rows.shape[1]:
            # the same weights from the n x n system
            small = rows @ rows.T + penalty * np.eye(len(rows))
            weights = rows.T @ np.linalg.solve(small, targets - bias)
        else:
            weights = np.linalg.solve(rows.T @ rows + penalty * np.eye(rows.shape[1]), rows.T @ (targets - bias))
        return cls(classes, mean, weights, bias)

    def predict(self, features: Float[np.ndarray, "n d"]) -> Int[np.ndarray, " n"]:
        """Most likely label for every row."""
        return self.classes[((features - self.mean) @ self.weights + self.bias).argmax(axis=1)]

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
        rows = _double(features[labels == label])
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
    log_given = torch.log_softmax(_double(logits), dim=1)
    log_mean = torch.logsumexp(log_given, dim=0) - np.log(len(logits))
    return float((log_given.exp() * (log_given - log_mean)).sum(dim=1).mean().exp())


def _mean_pair_distance(rows: Float[Tensor, "n d"]) -> float:
    total = 0.0
    for start in range(0, len(rows), 1024):
        block = rows[start : start + 1024]
        total += float(torch.cdist(block, rows, compute_mode="donot_use_mm_for_euclid_dist").sum())
    return total / (len(rows) * (len(rows) - 1))


def _share(right: Bool[np.ndarray, " n"]) -> float:
    if not len(right):
        raise UserError("accuracy needs at least one image, got none. Pass features of samples or held-out images.")
    return float(right.mean())


def _double(array: np.ndarray) -> Tensor:
    # copied: torch takes no array that is read backwards or may not be written to
    return torch.from_numpy(np.array(array, dtype=np.float64))
