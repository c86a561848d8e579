import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.evaluation.features import FeatureNetwork, extract_features, feature_network
from isthmus.nn.perceptual import EfficientNetLite0
from isthmus.pictures import to_uint8
from tests.evaluation.photo_crops import photo_crops


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return feature_network("lite0")


def test_features_do_not_depend_on_batches_or_on_how_images_arrive(network):
    images = photo_crops("chelsea", 5)
    whole = extract_features(network, images)
    assert {name: rows.shape for name, rows in whole.items()} == {"lite0-192": (5, 192), "lite0-1280": (5, 1280)}
    streamed = extract_features(network, (image for image in images), batch_size=2)
    for name, rows in whole.items():
        np.testing.assert_allclose(streamed[name], rows, rtol=1e-3, atol=1e-4)


def test_lite0_features_are_those_of_the_network_on_the_images_that_the_values_stand_for(network):
    images = torch.linspace(-1, 1, 2 * 3 * 24 * 24).view(2, 3, 24, 24)
    values = to_uint8(images)
    seen = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = EfficientNetLite0().features(seen)
    found = extract_features(network, values)
    np.testing.assert_allclose(found["lite0-1280"], expected.pooled.numpy(), rtol=1e-4, atol=1e-5)
    middle = expected.taps[-1].mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(found["lite0-192"], middle, rtol=1e-4, atol=1e-5)


def test_no_image_gives_no_rows(network):
    assert [rows.shape for rows in extract_features(network, []).values()] == [(0, 192), (0, 1280)]


def test_images_of_two_sizes_are_refused(network):
    with pytest.raises(UserError, match="one size"):
        extract_features(network, [np.zeros((32, 32, 3), np.uint8), np.zeros((33, 32, 3), np.uint8)])


def test_large_images_come_in_small_batches():
    """Memory is bounded by pixels: 4 Mi of them at once, or one image."""
    seen = []

    def run(images_uint8):
        seen.append(tuple(images_uint8.shape))
        return {"net-1": images_uint8.float().mean(dim=(1, 2, 3))[:, None]}

    own = FeatureNetwork(
        run, name="net", spaces={"net-1": 1}, preprocessing="", weights_sha256="", device=torch.device("cpu")
    )
    for side, batches in ((1024, [4, 1]), (2048, [1, 1, 1, 1, 1])):
        seen.clear()
        image = np.zeros((side, side, 3), np.uint8)
        assert extract_features(own, (image for _ in range(5)))["net-1"].shape == (5, 1)
        assert [shape[0] for shape in seen] == batches
