import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.evaluation.features import FEATURES, FeatureNetwork, extract_features, feature_network, sample_features
from isthmus.nn.perceptual import EfficientNetLite0
from isthmus.pictures import to_uint8
from isthmus.samples import draw, read
from tests.evaluation.photo_crops import photo_crops
from tests.evaluation.tiny_evaluation import mean_colour
from tests.pipelines.tiny import tiny_pipeline
from tests.tiny_samples import tiny_request


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


def test_no_image_gives_no_rows_and_two_sizes_are_refused(network):
    assert [rows.shape for rows in extract_features(network, []).values()] == [(0, 192), (0, 1280)]
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


def test_features_of_samples_are_kept_beside_them(tmp_path, monkeypatch):
    # not a mock: the constant alone is smaller, so that a few images fill several groups
    monkeypatch.setattr("isthmus.evaluation.features.GROUP", 4)
    pipeline, network, seen = tiny_pipeline(), mean_colour(), []
    run = network.run
    network.run = lambda images: seen.append(len(images)) or run(images)

    def features(num: int, network=network):
        draw(pipeline, tmp_path, tiny_request(pipeline, num))
        seen.clear()
        return sample_features(network, read(tmp_path, num))["colour"]

    first = features(10)
    expected = [image.astype(np.float64).mean(axis=(0, 1)) for image in read(tmp_path)]
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    assert seen == [4, 4, 2]
    assert np.array_equal(features(10), first) and seen == []
    assert np.array_equal(features(5), first[:5]) and seen == []
    assert np.array_equal(features(13)[:10], first) and seen == [4, 1], "the last group was not full"
    (tmp_path / FEATURES).write_bytes((tmp_path / FEATURES).read_bytes()[:100])
    assert np.array_equal(features(10), first) and seen == [4, 4, 2]
    features(10, mean_colour("another"))
    assert np.array_equal(features(10), first) and seen == [4, 4, 2], "one network's at a time"
