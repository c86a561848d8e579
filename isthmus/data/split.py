"""Train and held-out parts by content: the same image lands on the same side wherever it lies and whatever its name."""

import numpy as np
from jaxtyping import Bool, Int

from isthmus.data.source import logger


def held_out(
    hashes: list[str], labels: Int[np.ndarray, " n"], val_fraction: float, *, source: str
) -> Bool[np.ndarray, " n"]:
    """(N,) bool, True = held out. `hashes` are the images' content hashes (hex), `labels` (N,) their classes.

    An image is held out when its hash, read as a number in [0, 1), lies below `val_fraction`: adding images moves no
    other image. Equal contents stay together. Two corrections for tiny sets: every class keeps an image to train on,
    and one image is held out where that leaves every class one. All False means nothing can be held out.
    """
    forced_to_train: set[str] = set()
    below = np.array([int(digest[:12], 16) / 16**12 < val_fraction for digest in hashes])
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if below[members].all():
            forced_to_train.add(max(hashes[i] for i in members))
    mask = below & np.array([digest not in forced_to_train for digest in hashes])
    if val_fraction > 0 and not mask.any():
        mask = _hold_out_one(hashes, labels)
    if val_fraction > 0 and not mask.any():
        logger.warning(
            "%s: too few images to hold any out; held-out figures will be those of the training images", source
        )
    return mask


def _hold_out_one(hashes: list[str], labels: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    contents = np.array(hashes)
    spare = [set(contents[labels == label]) for label in np.unique(labels)]
    for digest in sorted(set(hashes)):
        if all(kept - {digest} for kept in spare):
            return contents == digest
    return np.zeros(len(hashes), dtype=bool)
