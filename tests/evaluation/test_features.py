import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.evaluation.features import (
    NearestClassMean,
    lite0_features,
    memorised_share,
    nearest_neighbour_distances,
)
from isthmus.models.efficientnet_lite import EfficientNetLite0


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def photo_crops(name: str, count: int, *, left_half: bool) -> torch.Tensor:
    """Random 96-pixel crops of one half of a photograph, shrunk to 32 pixels, in [-1, 1]."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() / 127.5 - 1
    middle = pixels.shape[2] // 2
    half = pixels[:, :, :middle] if left_half else pixels[:, :, middle:]
    generator = torch.Generator().manual_seed(5)
    crops = []
    for _ in range(count):
        top = int(torch.randint(half.shape[1] - 96, (), generator=generator))
        left = int(torch.randint(half.shape[2] - 96, (), generator=generator))
        crops.append(half[:, top : top + 96, left : left + 96])
    return torch.nn.functional.interpolate(torch.stack(crops), (32, 32), mode="area")


def test_features_do_not_depend_on_batches_or_on_how_images_arrive(network):
    images = photo_crops("chelsea", 5, left_half=True)
    whole = lite0_features(images, network=network)
    assert whole.pooled_192.shape == (5, 192) and whole.pooled_1280.shape == (5, 1280)
    streamed = lite0_features((image for image in images), batch_size=2, network=network)
    np.testing.assert_allclose(streamed.pooled_192, whole.pooled_192, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(streamed.pooled_1280, whole.pooled_1280, rtol=1e-3, atol=1e-4)


def test_no_image_gives_no_rows(network):
    empty = lite0_features([], network=network)
    assert empty.pooled_192.shape == (0, 192) and empty.pooled_1280.shape == (0, 1280)


def test_images_of_two_sizes_are_refused(network):
    with pytest.raises(UserError, match="one size"):
        lite0_features([torch.zeros(3, 32, 32), torch.zeros(3, 32, 33)], network=network)


def test_class_means_by_hand():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0]])
    means = NearestClassMean.fit(features, np.array([7, 7, 3]))
    np.testing.assert_array_equal(means.classes, [3, 7])
    np.testing.assert_array_equal(means.means, [[10.0, 0.0], [1.0, 0.0]])
    # the border between 1 and 10 lies at 5.5
    np.testing.assert_array_equal(means.predict(np.array([[5.4, 0.0], [5.6, 0.0]])), [7, 3])
    assert means.accuracy(np.array([[5.4, 0.0], [5.6, 0.0]]), np.array([7, 9])) == 0.5


def test_photographs_are_told_apart_on_their_unseen_halves(network):
    names, labels = ("chelsea", "coffee", "rocket"), np.repeat(np.arange(3), 12)
    seen, unseen = (
        lite0_features(torch.cat([photo_crops(n, 12, left_half=half) for n in names]), network=network).pooled_192
        for half in (True, False)
    )
    assert NearestClassMean.fit(seen, labels).accuracy(unseen, labels) > 0.75


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_nearest_neighbours_in_blocks(block_size):
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(6, 4)), rng.normal(size=(10, 4))
    expected = np.sqrt(((queries[:, None] - references[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(nearest_neighbour_distances(queries, references, block_size=block_size), expected)
    assert (nearest_neighbour_distances(references[2:5], references, block_size=block_size) == 0).all()


def test_copies_count_as_memorised_and_new_images_do_not():
    rng = np.random.default_rng(1)
    training, held_out, fresh = (rng.normal(size=(200, 16)) for _ in range(3))
    assert memorised_share(training[:50], training, held_out) == 1
    assert memorised_share(fresh, training, held_out) < 0.05
    half_copied = np.concatenate([training[:100] + 1e-3, fresh[:100]])
    assert memorised_share(half_copied, training, held_out) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("empty", ["samples", "training", "held_out"])
def test_shares_of_nothing_are_refused(empty):
    arrays = {name: np.zeros((0 if name == empty else 2, 3)) for name in ("samples", "training", "held_out")}
    with pytest.raises(UserError, match="got (none|0 and 2|2 and 0)"):
        memorised_share(**arrays)
