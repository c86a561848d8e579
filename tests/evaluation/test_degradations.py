import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation.degradations import blurred, noisy, recompressed, ruined
from isthmus.evaluation.feature_networks import feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.statistics import Gaussian, frechet_distance
from tests.evaluation.photo_crops import photo_crops

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        [lambda image, s=s: blurred(image, s) for s in (0, 0.5, 1, 2, 4)],
        [lambda image, s=s: noisy(image, s) for s in (0, 0.05, 0.1, 0.2)],
        [lambda image, q=q: recompressed(image, q) for q in (95, 60, 10)],
    ],
    ids=["blur", "noise", "jpeg"],
)
def test_the_distance_grows_with_the_damage(changes):
    network = feature_network("lite0")
    names = ("chelsea", "coffee", "rocket")
    left = np.concatenate([photo_crops(name, 100) for name in names])
    right = np.concatenate([photo_crops(name, 100, seed=6) for name in names])
    reference = Gaussian.of(extract_features(network, left)["lite0-192"])
    distances = []
    for change in changes:
        rows = extract_features(network, (change(image) for image in right))["lite0-192"]
        distances.append(frechet_distance(Gaussian.of(rows), reference))
    assert distances == sorted(distances)
    assert distances[-1] > 1.5 * distances[0]


def test_a_ruined_image_keeps_its_mean_and_little_else():
    images = photo_crops("chelsea", 4)
    for image, worse in zip(images, ruined(images), strict=True):
        np.testing.assert_allclose(worse.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1)
        assert worse.std(axis=(0, 1)).max() < 0.6 * image.std(axis=(0, 1)).max()


@given(st.floats(0.2, 20), st.integers(1, 9), st.integers(1, 9))
def test_blur_keeps_the_mean_of_images_of_any_size(deviation, height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    worse = blurred(image, deviation)
    np.testing.assert_allclose(worse.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=0.51)


def test_a_blur_in_the_middle_is_scipys():
    from scipy.ndimage import gaussian_filter

    image = photo_crops("coffee", 1)[0]
    expected = gaussian_filter(image.astype(float), (1.5, 1.5, 0), mode="reflect", truncate=4)
    assert np.abs(blurred(image, 1.5) - expected).max() <= 0.51


@pytest.mark.parametrize("wrong", [lambda i: blurred(i, -1), lambda i: noisy(i, -0.1), lambda i: recompressed(i, 0)])
def test_negative_damage_is_refused(wrong):
    with pytest.raises(UserError, match="must"):
        wrong(np.zeros((4, 4, 3), np.uint8))
