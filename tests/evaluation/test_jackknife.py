"""Groups of images tell how sure a score is, and more of a difference of two scores of the same images."""

import numpy as np
import pytest

from isthmus.evaluation.jackknife import (
    NUM_GROUPS,
    error_of,
    frechet_parts,
    groups_of,
    kernel_parts,
    mean_parts,
    rebuilt_parts,
)
from isthmus.evaluation.statistics import Gaussian, frechet_distance

REFERENCE = np.random.default_rng(0).normal(size=(4000, 4))


def normal(seed: int, *, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)) + 0.3


def test_the_error_of_a_frechet_distance_is_how_far_other_draws_lie():
    reference = Gaussian.of(REFERENCE)
    spread = np.std([frechet_distance(Gaussian.of(normal(seed)), reference) for seed in range(1, 41)], ddof=1)
    errors = [error_of(frechet_parts(normal(seed), reference)) for seed in range(1, 11)]
    assert np.mean([error for error in errors if error is not None]) == pytest.approx(spread, rel=0.3)


def test_parts_of_a_mean_are_those_of_its_groups_and_so_is_its_error():
    values = np.random.default_rng(0).normal(size=2000)
    parts = mean_parts(values)
    assert np.mean(parts) == pytest.approx(values.mean())
    assert error_of(parts) == pytest.approx(values.std() / len(values) ** 0.5, rel=0.4)


def test_classes_that_take_turns_are_in_every_group():
    assert all(len(set((group % NUM_GROUPS).tolist())) > NUM_GROUPS // 2 for group in groups_of(1000))


def test_what_two_sides_share_cancels():
    """Reconstructions that differ a little, of images that differ much: the difference is surer than either side."""
    images, noise = normal(1), 0.1 * normal(2)
    one, other = images + noise, images + 1.1 * noise
    for parts in (
        lambda rows: frechet_parts(rows, Gaussian.of(REFERENCE)),
        lambda rows: rebuilt_parts(rows, images),
        lambda rows: kernel_parts(rows, REFERENCE),
    ):
        first, second = parts(one), parts(other)
        gap = error_of([a - b for a, b in zip(first, second, strict=True)])
        assert gap is not None and gap < 0.5 * max(error_of(first) or 0, error_of(second) or 0)


def test_few_images_have_no_parts():
    assert mean_parts(np.ones(39)) == [] and error_of([]) is None
    assert frechet_parts(REFERENCE[:39], Gaussian.of(REFERENCE)) == []
