"""What makes a score mislead, said before it is printed.

A guard raises `UserError` where no honest number can follow; otherwise it returns its warning, or None where all is
well. Warnings go into the record and the report, beside the scores.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from isthmus.errors import UserError

FEWEST_FOR_FRECHET = 1000
"""Below this many images the kernel distance and the class scores lead."""

BUILT_IN_SENTENCE = (
    "Of a built-in set the reference is the training and held-out images together, so a model that copies its training "
    "images would score well. Read the share of memorised samples beside every distance."
)
"""What a report says of the built-in sets, whose reference holds the training images."""

MOST_DUPLICATES = 0.5
"""Above this share of exact duplicates a set of samples is refused."""

MOST_MOVED = 0.05
"""Samples of which a larger share would have to change class to have the reference's frequencies are warned of."""

# where only a share of the training images was looked at: how many may be found before all are taken to be there
_MOST_EXPECTED, _FEWEST_SHARED = 0.8, 10


def check_enough_images(count: int, width: int, *, space: str) -> str | None:
    """Too few images for a covariance of this width. Raises UserError for fewer than two.

    >>> print(check_enough_images(100, 192, space="lite0-192"))
    100 images give lite0-192 features a covariance of rank 99 of 192: ...
    """
    if count < 2:
        raise UserError(f"a distance needs at least 2 images on both sides, got {count}. Draw more images.")
    if count > width:
        return None
    return (
        f"{count} images give {space} features a covariance of rank {count - 1} of {width}: the Frechet distance is "
        "biased upward and compares only at exactly this number. Read the kernel distance, or use more than "
        f"{width} images."
    )


def check_value_range(images: Iterable[UInt8[np.ndarray, "h w 3"] | Float[np.ndarray, "h w 3"]]) -> None:
    """Raise UserError for floats, or where no image has a value above 1: somebody scaled them.

    Images are read up to the first one that settles the matter.
    """
    looked_at = 0
    for image in images:
        looked_at += 1
        if image.dtype != np.uint8:
            raise UserError(
                f"images must be 8-bit values in [0, 255], got {image.dtype} from {image.min():g} to {image.max():g}. "
                "Multiply values in [0, 1] by 255 and round, then save them as uint8."
            )
        if int(image.max()) > 1:
            return
    if looked_at:
        raise UserError(
            f"images must be 8-bit values in [0, 255], got none above 1 in {looked_at} image(s). They were probably in "
            "[0, 1] when they were saved: multiply by 255 and save them again."
        )


def check_duplicates(digests: Sequence[str] | Sequence[bytes]) -> str | None:
    """Samples that are equal to the last bit, by their `pixel_digest`s: all but the first of each kind are duplicates.

    Raises UserError where more than `MOST_DUPLICATES` of the images are.

    >>> print(check_duplicates(["a", "b", "b", "c"]))
    1 of 4 images (25 %) equals an earlier one to the last bit. ...
    """
    number = len(digests) - len(set(digests))
    if not number:
        return None
    share, verb = number / len(digests), "equals" if number == 1 else "equal"
    found = f"{number} of {len(digests)} images ({100 * share:.3g} %)"
    if share > MOST_DUPLICATES:
        raise UserError(
            f"samples must differ, but {found} equal an earlier one to the last bit. Check the seeds (image i must be "
            "drawn from its own), or the model, which may have collapsed."
        )
    return f"{found} {verb} an earlier one to the last bit. Variety scores count them as they are."


def pixel_digest(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """SHA-256 (hex) of an image's size and values."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def check_reference(
    reference_digests: Iterable[str], training_digests: Iterable[str], *, built_in: bool, looked_at: float = 1.0
) -> str | None:
    """A reference that is the training set rewards copying; `BUILT_IN_SENTENCE` for the sets of the package.

    Args:
        reference_digests: `pixel_digest` of the reference images.
        training_digests: `pixel_digest` of the training images at the same size.
        built_in: whether the images came with the package.
        looked_at: share of all training images that `training_digests` are of, in (0, 1].

    Raises:
        UserError: every reference image is a training image, or seems to be where only a share was looked at.
    """
    if built_in:
        return BUILT_IN_SENTENCE
    reference, known = list(reference_digests), set(training_digests)
    shared = sum(digest in known for digest in reference)
    # of a reference that is made of training images, about this many are among those that were looked at
    expected = looked_at * len(reference)
    some = "" if looked_at == 1 else f" among the {100 * looked_at:.3g} % of the training images that were looked at"
    if reference and shared >= (expected if looked_at == 1 else max(_MOST_EXPECTED * expected, _FEWEST_SHARED)):
        raise UserError(
            "the reference must hold images that the model was not trained on, but "
            + (f"all {shared} are training images" if not some else f"{shared} of its {len(reference)} are{some}")
            + ": copying them would score best. Pass held-out images as --reference."
        )
    if shared:
        return f"{shared} of {len(reference)} reference images are training images{some}, which favours copies of them."
    return None


def check_copy_distance(distance: float) -> str | None:
    """Held-out images that equal training images leave nothing between a copy and a new image.

    >>> check_copy_distance(0.5) is None
    True
    """
    if distance > 0:
        return None
    return (
        "1 % or more of the held-out images equal a training image in feature space: only samples that do so too count "
        "as memorised. Remove duplicates from the data."
    )


def check_classes(labels: Int[np.ndarray, " n"]) -> str | None:
    """A single class leaves nothing to tell apart: class scores are left out.

    >>> print(check_classes(np.array([3, 3])))
    All images are of one class: class consistency and per-class scores are left out.
    """
    if len(np.unique(labels)) > 1:
        return None
    return "All images are of one class: class consistency and per-class scores are left out."


def check_balance(
    sample_labels: Int[np.ndarray, " n"], reference_labels: Int[np.ndarray, " m"], names: Sequence[str]
) -> str | None:
    """Samples whose classes are not as frequent as the reference's are off by that alone.

    >>> print(check_balance(np.array([0, 1]), np.array([0, 0, 0, 1]), ["face", "flag"]))
    Classes are not as frequent as in the reference (face: 50 % of the samples, 75 % of the reference): ...
    """
    ours, theirs = (
        np.bincount(labels, minlength=len(names)) / len(labels) for labels in (sample_labels, reference_labels)
    )
    if np.abs(ours - theirs).sum() / 2 <= MOST_MOVED:
        return None
    most = int(np.abs(ours - theirs).argmax())
    return (
        f"Classes are not as frequent as in the reference ({names[most]}: {100 * ours[most]:.0f} % of the samples, "
        f"{100 * theirs[most]:.0f} % of the reference): a part of every distance comes from "
        "that alone, however good the model. Compare at equal balance only, or draw as often as in the data "
        "(--balance data)."
    )


def check_small_set(count: int) -> str | None:
    """Few images: which scores to read first.

    >>> check_small_set(5000) is None
    True
    """
    if count >= FEWEST_FOR_FRECHET:
        return None
    return (
        f"n = {count} is below {FEWEST_FOR_FRECHET:,}: the kernel distance (unbiased at any n) and class consistency "
        "lead, Frechet distances follow."
    )
