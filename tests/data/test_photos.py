import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.images import decode_image
from isthmus.data.opening import open_source
from isthmus.data.photos import LARGEST_CROP, PHOTO_CLASSES, PHOTOS, SMALLEST_CROP
from isthmus.errors import UserError

TRAIN, VAL = (open_source("photos", image_size=16, split=split) for split in ("train", "val"))


def whole(photo) -> np.ndarray:
    package = importlib.util.find_spec(photo.package)
    return decode_image((Path(package.origin).parent / photo.file).read_bytes())


def test_training_region_and_held_out_strip_are_the_two_parts_of_a_photo():
    for photo, kept, strip in zip(PHOTOS, TRAIN.regions, VAL.regions, strict=True):
        parts = {"right": (kept, strip), "left": (strip, kept), "bottom": (kept, strip)}[photo.strip]
        axis = 0 if photo.strip == "bottom" else 1
        np.testing.assert_array_equal(np.concatenate(parts, axis=axis), whole(photo))


@given(index=st.integers(0, len(TRAIN) - 1), seed=st.integers(0, 1000))
def test_crops_are_squares_of_their_own_region(index, seed):
    crop = TRAIN.draw(index, np.random.default_rng(seed))
    side = crop.shape[0]
    assert crop.shape == (side, side, 3) and SMALLEST_CROP <= side <= LARGEST_CROP
    # a view into the region, so it cannot show anything else
    assert np.shares_memory(crop, TRAIN.regions[TRAIN.labels[index]])


def test_load_is_fixed_and_draw_is_fresh():
    np.testing.assert_array_equal(TRAIN.load(7), TRAIN.load(7))
    assert TRAIN.load(7).tobytes() != TRAIN.load(17).tobytes()
    assert TRAIN.draw(7, np.random.default_rng(0)).tobytes() != TRAIN.draw(7, np.random.default_rng(1)).tobytes()


def test_classes_are_balanced_photographs():
    assert TRAIN.class_names == PHOTO_CLASSES and len(PHOTO_CLASSES) == 10
    assert len(set(np.bincount(TRAIN.labels))) == 1 and len(set(np.bincount(VAL.labels))) == 1
    assert "danielbuechele" in TRAIN.attribution and "vultilion" in TRAIN.attribution
    some = open_source("photos", image_size=16, classes=("flower", "cat"))
    assert some.class_names == ("flower", "cat")
    np.testing.assert_array_equal(some.regions[1], TRAIN.regions[PHOTO_CLASSES.index("cat")])
    with pytest.raises(UserError, match="Did you mean"):
        open_source("photos", image_size=16, classes=("flowr",))
