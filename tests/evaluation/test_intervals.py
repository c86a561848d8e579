import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation.statistics import bootstrap_interval, mean_interval, wilson_interval


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20))
def test_the_interval_lies_within_the_values_and_is_found_again(values):
    found = bootstrap_interval(np.array(values))
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found == bootstrap_interval(np.array(values))


def test_the_interval_is_as_wide_as_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(size=2000)
    found = bootstrap_interval(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.1)
    assert found.low < found.mean < found.high


def test_it_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [bootstrap_interval((rng.random(100) < 0.3).astype(float)) for _ in range(200)]
    held = np.mean([one.low <= 0.3 <= one.high for one in found])
    assert 0.91 <= held <= 0.99


@given(st.integers(1, 300), st.data())
def test_wilsons_ends_are_the_shares_whose_own_deviation_reaches_the_one_found(count, data):
    """The definition: |found - p| = z sqrt(p (1 - p) / n) at both ends; mirrored for those that are not in it."""
    hits = data.draw(st.integers(0, count))
    found, other = wilson_interval(hits, count), wilson_interval(count - hits, count)
    assert 0 <= found.low <= found.mean <= found.high <= 1 and found.high > found.low
    for end in (found.low, found.high):
        if 0 < end < 1:
            assert abs(found.mean - end) == pytest.approx(1.959964 * (end * (1 - end) / count) ** 0.5, rel=1e-4)
    assert (1 - other.high, 1 - other.low) == pytest.approx((found.low, found.high))


def test_shares_are_wilsons_and_other_means_are_bootstrapped():
    shares, others = np.repeat([0.0, 1.0], [99, 1]), np.random.default_rng(0).normal(size=100)
    assert mean_interval(shares) == mean_interval(shares.astype(bool)) == wilson_interval(1, 100)
    assert mean_interval(others) == bootstrap_interval(others)


def test_an_interval_of_nothing_is_refused():
    for interval in (bootstrap_interval, mean_interval):
        with pytest.raises(UserError, match="got none"):
            interval(np.zeros(0))
