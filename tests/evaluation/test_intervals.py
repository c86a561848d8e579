import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation.intervals import bootstrap_interval, spread


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.integers(0, 3))
def test_the_interval_holds_the_mean_and_lies_within_the_values(values, seed):
    found = bootstrap_interval(np.array(values), seed=seed)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found == bootstrap_interval(np.array(values), seed=seed)


def test_the_interval_is_as_wide_as_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(size=2000)
    found = bootstrap_interval(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.1)
    assert found.low < found.mean < found.high


def test_it_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [bootstrap_interval((rng.random(100) < 0.3).astype(float), level=0.9) for _ in range(200)]
    held = np.mean([one.low <= 0.3 <= one.high for one in found])
    assert 0.84 <= held <= 0.96


@pytest.mark.parametrize(
    "arguments",
    [{"values": np.zeros(0)}, {"values": np.ones(2), "level": 1.0}, {"values": np.ones(2), "num_resamples": 0}],
)
def test_impossible_intervals_are_refused(arguments):
    with pytest.raises(UserError, match="got"):
        bootstrap_interval(**arguments)


def test_a_spread_of_nothing_is_refused():
    with pytest.raises(UserError, match="at least one"):
        spread([])
