import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.evaluation.statistics import Gaussian, frechet_distance, mean_and_covariance


def rows(count: int, width: int, *, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) @ np.diag(np.arange(1, width + 1)) + shift


@given(
    arrays.arrays(np.float64, st.tuples(st.integers(2, 30), st.just(3)), elements=st.floats(-1e3, 1e3)),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_streaming_equals_numpy_however_the_rows_arrive(values, cuts):
    mean, covariance, count = mean_and_covariance(np.split(values, sorted(cuts)))
    assert count == len(values)
    np.testing.assert_allclose(mean.numpy(), values.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(covariance.numpy(), np.cov(values.T), atol=1e-6)


def test_order_does_not_matter():
    values, reference = rows(60, 5), Gaussian.of(rows(70, 5, seed=1))
    expected = frechet_distance(Gaussian.of(values), reference)
    for order in (slice(None, None, -1), np.random.default_rng(1).permutation(60)):
        assert frechet_distance(Gaussian.of(values[order]), reference) == pytest.approx(expected, rel=1e-9)


def test_two_gaussians_by_formula():
    # diagonal covariances commute: the distance is |m1 - m2|^2 + sum (s1 - s2)^2 of the deviations
    ours, theirs = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 0.0])
    one = Gaussian.from_covariance(np.array([1.0, 0.0, -1.0]), np.diag(ours**2))
    two = Gaussian.from_covariance(np.zeros(3), np.diag(theirs**2))
    assert frechet_distance(one, two) == pytest.approx(2 + 1 + 2.25 + 9)
    assert frechet_distance(two, one) == pytest.approx(frechet_distance(one, two))


def test_it_is_the_distance_with_scipys_matrix_root():
    from scipy.linalg import sqrtm

    a, b = rows(40, 6), rows(50, 6, seed=2, shift=1.0) @ np.random.default_rng(3).normal(size=(6, 6))
    s1, s2 = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(sqrtm(s1 @ s2)))
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(expected, rel=1e-8)


def test_few_rows_give_the_distance_of_their_covariance():
    """The rows themselves serve as a factor while there are no more of them than columns."""
    reference = Gaussian.of(rows(30, 20, seed=1))
    for count in (2, 8, 20, 21, 200):
        values = rows(count, 20)
        mean, covariance, _ = mean_and_covariance([values])
        direct, streamed = Gaussian.of(values), Gaussian.from_covariance(mean, covariance)
        assert_close(direct.covariance, covariance)
        expected = frechet_distance(streamed, reference)
        assert frechet_distance(direct, reference) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(direct, streamed) < 1e-9 * float(direct.factor.square().sum())


def test_features_in_single_precision_far_from_zero_keep_their_covariance():
    values = (rows(500, 3) + 1e4).astype(np.float32)
    _, covariance, _ = mean_and_covariance(np.array_split(values, 7))
    np.testing.assert_allclose(covariance.numpy(), np.cov(values.T.astype(np.float64)), rtol=1e-9)


def test_what_is_no_covariance_is_refused():
    for covariance, said in (
        (np.eye(3), "must be .2, 2."),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (np.diag([1.0, -0.1]), "negative"),
        (np.array([[np.nan, 0.0], [0.0, 1.0]]), "finite"),
    ):
        with pytest.raises(UserError, match=said):
            Gaussian.from_covariance(torch.zeros(2), torch.from_numpy(covariance))


def test_features_without_a_covariance_are_refused():
    with pytest.raises(UserError, match="finite"):
        mean_and_covariance([np.full((2, 3), np.inf)])
    with pytest.raises(UserError, match="at least 2"):
        mean_and_covariance([np.zeros((1, 3))])
