"""Two disjoint halves of the real images: one to measure against, one to say what a perfect score would be."""

import numpy as np
from jaxtyping import Int

from isthmus.errors import UserError
from isthmus.functional.draws import SPLIT, stream


def images_per_measurement(num_samples: int, num_real: int) -> int:
    """n: the size at which floor, ceiling and score are all computed, min(N, half the real images).

    Raises:
        UserError: there are too few images on either side.
    """
    n = min(num_samples, num_real // 2)
    if n < 2:
        raise UserError(
            f"a comparison needs at least 2 samples and 4 real images, got {num_samples} and {num_real}. Pass more."
        )
    return n


def disjoint_halves(
    labels: Int[np.ndarray, " n"], size: int, *, seed: int = 0
) -> tuple[Int[np.ndarray, " size"], Int[np.ndarray, " size"]]:
    """Indices of two disjoint sets of `size` images, both with the class frequencies of all images.

    Fixed by the labels and the seed; the default is part of the protocol. Unlabelled images have one label.

    Raises:
        UserError: `size` is more than half of the images.
    """
    if not 1 <= size <= len(labels) // 2:
        raise UserError(f"a half must hold 1..{len(labels) // 2} of {len(labels)} images, got {size}.")
    generator, dealt = stream(seed, SPLIT), 0
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
