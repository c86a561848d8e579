import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.images import Augmentation, augmented_view, centre_view
from isthmus.errors import UserError

SIZES = st.integers(1, 60)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.slow
@given(
    height=SIZES,
    width=SIZES,
    size=st.integers(1, 40),
    ratio=st.floats(1, 2),
    shift=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
def test_views_are_square_whatever_the_image(height, width, size, ratio, shift, seed):
    augment = Augmentation(resize_ratio=ratio, max_shift=shift)
    view = augmented_view(noise(height, width), size, augment, np.random.default_rng(seed), may_flip=True)
    assert view.shape == (size, size, 3) and view.dtype == np.uint8
    assert centre_view(noise(height, width), size).shape == (size, size, 3)


def test_shrinking_averages():
    # one-pixel stripes: without antialiasing they become black or white, with it grey
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(centre_view(stripes, 8).astype(int) - 127).max() < 12


def test_all_off_is_the_image_itself():
    image = noise(16, 16)
    augment = Augmentation(resize_ratio=1, flip=False)
    np.testing.assert_array_equal(augmented_view(image, 16, augment, np.random.default_rng(0), may_flip=True), image)


def test_flips_happen_where_they_may():
    image = noise(8, 8)
    augment = Augmentation(resize_ratio=1)

    def flipped(seed: int, may_flip: bool) -> bool:
        view = augmented_view(image, 8, augment, np.random.default_rng(seed), may_flip=may_flip)
        return bool((view == image[:, ::-1]).all())

    assert {flipped(seed, True) for seed in range(20)} == {True, False}
    assert not any(flipped(seed, False) for seed in range(20))


def test_shifts_reach_both_sides_and_not_further():
    image = np.full((16, 16, 3), 255, dtype=np.uint8)
    image[8, 8] = 0
    augment = Augmentation(resize_ratio=1, flip=False, max_shift=1 / 8)
    views = [augmented_view(image, 16, augment, np.random.default_rng(seed), may_flip=False) for seed in range(200)]
    places = {tuple(int(i) for i in np.argwhere(view[..., 0] == 0)[0]) for view in views}
    assert places == {(y, x) for y in range(6, 11) for x in range(6, 11)}


@given(seed=st.integers(0, 50))
def test_crops_lie_anywhere_in_the_resized_image(seed):
    augment = Augmentation(resize_ratio=1, flip=False)
    image = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (8, 1, 3))
    view = augmented_view(image, 8, augment, np.random.default_rng(seed), may_flip=False)
    first = int(view[0, 0, 0])
    np.testing.assert_array_equal(view, image[:, first : first + 8])


def test_impossible_settings():
    for bad in ({"resize_ratio": 0.9}, {"max_shift": -0.1}, {"max_shift": 0.6}):
        with pytest.raises(UserError):
            Augmentation(**bad)
