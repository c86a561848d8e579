"""Real images made worse by a known amount: the ceiling beside every distance, and what a distance must grow with."""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import UInt8

from isthmus.errors import UserError
from isthmus.functional.draws import NOISE, stream

Picture = UInt8[np.ndarray, "_ _ 3"]

RUINED_BLUR = 0.25
"""Deviation of the blur that leaves mean colour and a shimmer of layout, as a share of the shorter side."""

_TRUNCATE = 4  # a Gaussian is cut off so many deviations from its middle


def blurred(image_uint8: Picture, deviation_px: float) -> Picture:
    """The image under a Gaussian of this standard deviation, edges mirrored.

    Raises:
        UserError: a deviation below 0.

    >>> blurred(np.full((4, 5, 3), 7, np.uint8), 1.5).tolist() == np.full((4, 5, 3), 7).tolist()
    True
    """
    if deviation_px < 0:
        raise UserError(f"the deviation of a blur must be at least 0 px, got {deviation_px}.")
    if deviation_px == 0:
        return image_uint8.copy()
    radius = max(int(_TRUNCATE * deviation_px + 0.5), 1)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation_px) ** 2)
    kernel /= kernel.sum()
    values = image_uint8.astype(np.float64)
    for axis in (0, 1):
        values = np.tensordot(_taps(image_uint8.shape[axis], kernel), np.moveaxis(values, axis, 0), axes=1)
        values = np.moveaxis(values, 0, axis)
    return values.round().clip(0, 255).astype(np.uint8)


def noisy(image_uint8: Picture, level: float, *, seed: int = 0, index: int = 0) -> Picture:
    """The image plus normal noise of `level` (a share of the range 0..255), from the stream of (seed, index).

    Raises:
        UserError: a level below 0.
    """
    if level < 0:
        raise UserError(f"the level of noise must be at least 0, got {level}.")
    noise = stream(seed, NOISE, index).standard_normal(image_uint8.shape)
    return (image_uint8 + 255 * level * noise).round().clip(0, 255).astype(np.uint8)


def ruined(images_uint8: Iterable[Picture]) -> Iterator[Picture]:
    """Every image blurred until mean colour and a shimmer of layout are left: what a model at its worst could draw."""
    for image in images_uint8:
        yield blurred(image, RUINED_BLUR * min(image.shape[:2]))


def _taps(length: int, kernel: np.ndarray) -> np.ndarray:
    """The matrix (length, length) of a convolution along one axis, with mirrored edges."""
    radius = len(kernel) // 2
    matrix = np.zeros((length, length))
    for offset, weight in zip(range(-radius, radius + 1), kernel, strict=True):
        place = (np.arange(length) + offset) % (2 * length)
        matrix[np.arange(length), np.where(place < length, place, 2 * length - 1 - place)] += weight
    return matrix
