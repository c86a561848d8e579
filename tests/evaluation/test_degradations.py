import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from isthmus.evaluation.features import extract_features, feature_network
from isthmus.evaluation.held_out import as_floats
from isthmus.evaluation.images import blurred, ruined
from isthmus.evaluation.statistics import Gaussian, frechet_distance, kernel_distance
from isthmus.nn.perceptual import Lite0Distance
from tests.evaluation.photo_crops import photo_crops, photo_tiles

pytestmark = pytest.mark.slow


def noisy(image: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(image.shape)
    return (image + 255 * level * noise).round().clip(0, 255).astype(np.uint8)


PHOTOS = ("chelsea", "coffee", "rocket", "astronaut")


@pytest.mark.parametrize(
    "changes",
    [
        [np.copy, *(lambda image, s=s: blurred(image, s) for s in (0.5, 1, 2, 4))],
        [lambda image, s=s: noisy(image, s) for s in (0, 0.05, 0.1, 0.2)],
    ],
    ids=["blur", "noise"],
)
def test_every_distance_grows_with_the_damage(changes):
    """Of real images that share no pixel with the reference, and of damaged images to themselves."""
    network, perceptual = feature_network("lite0"), Lite0Distance()
    light, dark = (np.concatenate([photo_tiles(name, parity) for name in PHOTOS]) for parity in (0, 1))
    light, dark = light[::3], dark[::3]
    rows = extract_features(network, light)["lite0-192"]
    reference, found = Gaussian.of(rows), {"FD": [], "KD": [], "lite0": []}
    for change in changes:
        damaged = np.stack([change(image) for image in dark])
        drawn = extract_features(network, damaged)["lite0-192"]
        found["FD"].append(frechet_distance(Gaussian.of(drawn), reference))
        found["KD"].append(kernel_distance(drawn, rows).value)
        with torch.no_grad():
            found["lite0"].append(float(perceptual(as_floats(damaged), as_floats(dark)).mean()))
    for name, distances in found.items():
        assert distances == sorted(distances), name
        assert distances[-1] > 1.5 * distances[0], name


def test_a_ruined_image_keeps_its_mean_and_little_else():
    images = photo_crops("chelsea", 4)
    for image, worse in zip(images, ruined(images), strict=True):
        np.testing.assert_allclose(worse.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1)
        assert worse.std(axis=(0, 1)).max() < 0.6 * image.std(axis=(0, 1)).max()


@given(st.floats(0.2, 20), st.integers(1, 9), st.integers(1, 9))
def test_blur_is_scipys_and_keeps_the_mean_of_images_of_any_size(deviation, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    worse = blurred(image, deviation)
    np.testing.assert_allclose(worse.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=0.51)
    expected = gaussian_filter(image.astype(float), (deviation, deviation, 0), mode="reflect", truncate=4)
    assert np.abs(worse - expected).max() <= 0.51
