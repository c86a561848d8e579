"""Which class every sample of an evaluation has: fixed by its number alone, so that any part can be drawn anywhere."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from isthmus.data.cache import sha256_of_parts
from isthmus.errors import UserError

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
