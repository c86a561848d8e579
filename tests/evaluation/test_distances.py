import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation import statistics as distances
from isthmus.evaluation.statistics import Gaussian, frechet_distance, frechet_over_chunks, kernel_distance, squared_mmd


def normal(count: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)) + shift


@pytest.mark.slow
def test_the_kernel_distance_is_zero_on_average_where_distributions_are_equal():
    values = [kernel_distance(normal(200, seed=2 * i), normal(200, seed=2 * i + 1)).value for i in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 40**0.5
    assert min(values) < 0 < max(values)


@pytest.mark.slow
def test_the_standard_error_is_the_spread_between_experiments():
    found = [kernel_distance(normal(400, seed=2 * i), normal(400, seed=2 * i + 1, shift=0.5)) for i in range(30)]
    claimed = np.mean([one.standard_error or np.nan for one in found])
    # further cuts lower the noise, so the claim is on the safe side
    assert 0.8 < claimed / np.std([one.value for one in found]) < 2.5


@given(st.integers(1, 30), st.data())
def test_cuts_use_every_image_before_any_again_and_none_twice_at_once(total, data):
    count = data.draw(st.integers(1, total))
    cuts = distances._endless_cuts(np.random.default_rng(0), total, count)
    taken = [next(cuts) for _ in range(3 * -(-total // count))]
    assert all(len(set(cut.tolist())) == count and cut.max() < total for cut in taken)
    dealt = np.concatenate(taken)
    for start in range(0, len(dealt) - total + 1, total):
        assert set(dealt[start : start + total].tolist()) == set(range(total))


def test_every_sample_of_a_large_set_moves_the_kernel_distance():
    """1,000 samples against 50: ten cuts of 50 would leave half of them out."""
    samples, reference = normal(1000, seed=0), normal(50, seed=1)
    whole = kernel_distance(samples, reference)
    assert whole.num_subsets * whole.subset_size >= len(samples)
    for i in range(0, 1000, 97):
        moved = samples.copy()
        moved[i] += 50
        assert abs(kernel_distance(moved, reference).value - whole.value) > 1


def test_one_subset_of_everything_is_the_plain_estimate():
    a, b = normal(30, seed=0), normal(30, seed=1, shift=1.0)
    found = kernel_distance(a, b, num_subsets=1, subset_size=30)
    assert found.value == pytest.approx(squared_mmd(a, b))
    assert found.standard_error is None


def test_seeds_repeat_and_further_means_farther():
    a, b = normal(100, seed=0), normal(120, seed=1)
    assert kernel_distance(a, b) == kernel_distance(a, b)
    distances = [kernel_distance(a, b + shift).value for shift in (0, 0.5, 1, 2)]
    assert distances == sorted(distances)


def test_chunks_are_disjoint_and_of_one_size():
    samples, reference = normal(100, seed=0), Gaussian.of(normal(200, seed=1))
    over = frechet_over_chunks(samples, reference, chunk_size=30)
    assert over.count == 3 and over.deviation is not None
    whole = frechet_over_chunks(samples, reference, chunk_size=100)
    assert whole.mean == pytest.approx(frechet_distance(Gaussian.of(samples), reference))
    assert whole.deviation is None


def test_samples_sorted_by_class_give_mixed_chunks():
    by_class = np.concatenate([normal(200, seed=0), normal(200, seed=1, shift=8.0)])
    mixed = Gaussian.of(np.concatenate([normal(200, seed=2), normal(200, seed=3, shift=8.0)]))
    assert frechet_over_chunks(by_class, mixed, chunk_size=200).mean < 10


def test_impossible_sizes_are_refused():
    for size in (1, 101):
        with pytest.raises(UserError, match="chunk_size"):
            frechet_over_chunks(normal(100, seed=0), Gaussian.of(normal(9, seed=1)), chunk_size=size)
        with pytest.raises(UserError, match="subset_size"):
            kernel_distance(normal(100, seed=0), normal(100, seed=1), subset_size=size)
    with pytest.raises(UserError, match="at least 2 images"):
        kernel_distance(normal(1, seed=0), normal(5, seed=1))
