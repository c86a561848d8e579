import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation.guards import (
    BUILT_IN_SENTENCE,
    check_balance,
    check_classes,
    check_duplicates,
    check_enough_images,
    check_reference,
    check_small_set,
    check_value_range,
    pixel_digest,
)


def images(count: int, *, seed: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, 4, 5, 3), dtype=np.uint8)


def test_a_covariance_needs_more_images_than_columns():
    for count in (2, 192, 193, 10_000):
        rows = np.random.default_rng(0).normal(size=(min(count, 400), 192))
        full_rank = np.linalg.matrix_rank(np.cov(rows.T)) == 192
        warning = check_enough_images(count, 192, space="lite0-192")
        assert (warning is None) == full_rank == (count > 192)
    with pytest.raises(UserError, match="at least 2 images"):
        check_enough_images(1, 192, space="lite0-192")


def test_values_that_end_at_one_are_refused():
    with pytest.raises(UserError, match="none above 1 in 3"):
        check_value_range(images(3, high=2))
    with pytest.raises(UserError, match="8-bit values in .0, 255., got float32 from 0 to 1"):
        check_value_range([np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)])
    # one bright image settles it; black ones before it do not count against the set
    check_value_range([*images(2, high=1), *images(1)])
    check_value_range([])


def test_duplicates_are_counted_and_too_many_refused():
    different = [pixel_digest(image) for image in images(6)]
    assert check_duplicates(different) is None
    warning = check_duplicates([*different, different[0], different[1]])
    assert warning is not None and "2 of 8 images (25 %)" in warning
    with pytest.raises(UserError, match="75 %"):
        check_duplicates(different[:1] * 4)


def test_digests_tell_shapes_and_values_apart():
    image = images(1)[0]
    assert pixel_digest(image) == pixel_digest(image.copy())
    assert pixel_digest(image) != pixel_digest(image.transpose(1, 0, 2).reshape(4, 5, 3))
    assert pixel_digest(np.zeros((2, 8, 3), np.uint8)) != pixel_digest(np.zeros((4, 4, 3), np.uint8))


def test_a_reference_made_of_training_images_is_refused():
    training = [pixel_digest(image) for image in images(6)]
    held_out = [pixel_digest(image) for image in images(6, seed=1)]
    assert check_reference(held_out, training, built_in=False) is None
    warning = check_reference([*held_out, training[0]], training, built_in=False)
    assert warning is not None and warning.startswith("1 of 7")
    with pytest.raises(UserError, match="not trained on"):
        check_reference(training[:3], training, built_in=False)
    assert check_reference(training + held_out, training, built_in=True) == BUILT_IN_SENTENCE


def test_training_images_are_found_where_only_a_share_of_them_was_looked_at():
    """A reference of training images, of which every fourth was looked at; then one with few of them."""
    training = [str(i) for i in range(400)]
    looked_at = training[::4]
    with pytest.raises(UserError, match="100 of its 400 are among the 25 % of the training images"):
        check_reference(training, looked_at, built_in=False, looked_at=0.25)
    held_out = [f"new {i}" for i in range(380)]
    warning = check_reference(training[:20] + held_out, looked_at, built_in=False, looked_at=0.25)
    assert warning is not None and warning.startswith("5 of 400") and "25 %" in warning


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=5), times=st.integers(1, 3))
def test_only_moved_classes_are_said(counts, times):
    """Equal frequencies pass, whatever the numbers; a class that the reference lacks is named."""
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"class {i}" for i in range(len(counts) + 1)]
    assert check_balance(labels, np.repeat(labels, times), names) is None
    moved = np.full_like(labels, len(counts))
    warning = check_balance(moved, labels, names)
    assert warning is not None and names[-1] in warning and "100 % of the samples, 0 % of the reference" in warning


def test_single_classes_and_small_sets_are_said():
    assert check_classes(np.array([0, 1])) is None
    assert check_classes(np.zeros(4, int)) is not None
    warning = check_small_set(999)
    assert warning is not None and "999" in warning
    assert check_small_set(1000) is None
