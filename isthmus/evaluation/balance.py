"""Which class every sample of an evaluation has: fixed by its number alone, so that any part can be drawn anywhere."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from isthmus.errors import UserError


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
