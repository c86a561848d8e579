"""Real pixels for the laws of evaluation: crops of scikit-image's photographs."""

import numpy as np


def photo_crops(name: str, count: int, *, side: int = 32, left_half: bool = True, seed: int = 5) -> np.ndarray:
    """(count, side, side, 3) values 0..255: random crops of one half of a photograph, shrunk three times."""
    import skimage.data

    pixels = getattr(skimage.data, name)()
    middle = pixels.shape[1] // 2
    half = pixels[:, :middle] if left_half else pixels[:, middle:]
    generator, crops = np.random.default_rng(seed), []
    for _ in range(count):
        top, left = (int(generator.integers(length - 3 * side)) for length in half.shape[:2])
        crop = half[top : top + 3 * side, left : left + 3 * side].reshape(side, 3, side, 3, 3)
        crops.append(crop.mean(axis=(1, 3)).round().astype(np.uint8))
    return np.stack(crops)


def photo_tiles(name: str, parity: int, *, side: int = 32) -> np.ndarray:
    """(n, side, side, 3) values 0..255: the light (0) or dark (1) squares of a photograph under a chessboard.

    The two sets share no pixel, and as many squares of every part of the photograph lie in both.
    """
    import skimage.data

    pixels = getattr(skimage.data, name)()
    rows, columns = (length // side for length in pixels.shape[:2])
    places = [(row, column) for row in range(rows) for column in range(columns) if (row + column) % 2 == parity]
    return np.stack([pixels[r * side : (r + 1) * side, c * side : (c + 1) * side] for r, c in places])
