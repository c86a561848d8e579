"""Scores from features: floor below ceiling, halves disjoint, order irrelevant, files of statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.generation_scores import LabelledFeatures, RealFeatures
from isthmus.evaluation.real_side import RealSide, Reference
from isthmus.evaluation.reference_halves import disjoint_halves, images_per_measurement
from isthmus.evaluation.scoring import score_samples
from isthmus.evaluation.statistics import Gaussian
from isthmus.evaluation.usage import code_counts, usage_curves

N, WIDTH = 40, 4


@given(st.lists(st.integers(0, 4), min_size=4, max_size=60), st.data())
def test_halves_are_disjoint_and_of_the_same_classes(labels, data):
    labels = np.array(labels)
    size = data.draw(st.integers(1, len(labels) // 2))
    first, second = disjoint_halves(labels, size)
    assert len(first) == len(second) == size == len(set(first) | set(second)) / 2
    whole = disjoint_halves(labels, len(labels) // 2)
    assert np.array_equal(first, whole[0][:size])
    for label in np.unique(labels):
        counts = [int((labels[half] == label).sum()) for half in whole]
        assert abs(counts[0] - counts[1]) <= 2


def test_n_is_half_of_the_real_images_at_most():
    assert images_per_measurement(100, 31) == 15 and images_per_measurement(10, 31) == 10
    with pytest.raises(UserError, match="at least"):
        images_per_measurement(10, 3)


def network(spaces=None) -> FeatureNetwork:
    return FeatureNetwork(
        lambda images: {}, name="net", spaces=spaces or {"net-4": WIDTH}, preprocessing="", weights_sha256="",
        device=torch.device("cpu"),
    )  # fmt: skip


def rows(seed, count=N, shift=0.0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32) + np.float32(shift)


def two_classes(seed, count, shift=0.0) -> LabelledFeatures:
    labels = np.arange(count) % 2
    return LabelledFeatures(rows(seed, count, shift) + 5 * labels[:, None].astype(np.float32), labels)


def real_side() -> RealSide:
    features = RealFeatures({"net-4": rows(1)}, {"net-4": rows(2)}, {"net-4": rows(3, shift=4.0)})
    return RealSide(features, two_classes(4, 30), two_classes(5, 12), ("built in",))


REFERENCE = Reference("real images", "0", images=None)


def test_samples_like_the_real_ones_score_near_the_floor_and_far_from_the_ceiling():
    samples, labels = {"net-4": rows(6, 2 * N + 5)}, np.arange(2 * N + 5) % 2
    found = score_samples(samples, labels, REFERENCE, real_side(), network(), ("a", "b"))
    scores = {score.name: score for score in found.scores}
    for name in ("FD-net-4", "KD-net-4"):
        score = scores[name]
        assert score.floor is not None and score.ceiling is not None
        assert abs(score.value - score.floor) < 0.2 * (score.ceiling - score.floor), name
    assert scores["FD-net-4"].measurements == 2 and scores["FD-net-4"].images == N
    assert found.scores[0].name == "KD-net-4" and found.scores[1].name.startswith("class accuracy"), "few images"
    assert scores["precision"].low is not None and scores["FD-net-4"].low is None, "a distance is never bootstrapped"
    assert found.warnings[0] == "built in" and any("lead" in warning for warning in found.warnings)
    assert set(found.by_class) == {"a", "b"}


def test_the_order_of_the_samples_hardly_matters():
    samples = rows(6, N)
    one, two = (
        score_samples({"net-4": some}, None, REFERENCE, real_side(), network(), ()) for some in (samples, samples[::-1])
    )
    first, second = ({score.name: score.value for score in found.scores} for found in (one, two))
    assert first["FD-net-4"] == pytest.approx(second["FD-net-4"], rel=1e-6)
    assert first["precision"] == second["precision"]
    assert not any("class" in name for name in first), "without labels there are no class scores"


def test_a_single_class_leaves_class_scores_out():
    found = score_samples({"net-4": rows(6)}, np.zeros(N, int), REFERENCE, real_side(), network(), ("a", "b"))
    assert found.by_class == {} and any("one class" in warning for warning in found.warnings)


def test_a_file_of_statistics_is_measured_in_the_space_that_fits():
    real = RealSide(None, None, None, ())
    both = network({"wide": 7, "net-4": WIDTH})
    reference = Reference("stats", "0", None, Gaussian.of(rows(1, 500)))
    found = score_samples({"wide": np.zeros((N, 7), np.float32), "net-4": rows(2)}, None, reference, real, both, ())
    assert [score.name for score in found.scores] == ["FD-net-4"] and found.scores[0].floor is None
    with pytest.raises(UserError, match="4 wide"):
        score_samples({"wide": np.zeros((N, 7), np.float32)}, None, reference, real, network({"wide": 7}), ())


def test_usage_of_codes_by_hand():
    counts = code_counts(np.array([[0, 1, 2], [0, 3, 3]]), (1, 2), 4)
    assert counts.tolist() == [[2, 0, 0, 0], [0, 1, 1, 2]]
    used, perplexity = usage_curves(counts, ("first", "second"), "steps")
    assert used.values == (0.25, 0.75)
    assert perplexity.values == pytest.approx((1.0, 2**1.5))
