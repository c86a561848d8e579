"""Scores from features: floor below ceiling, halves disjoint, order irrelevant, files of statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import StatisticsOrigin
from isthmus.evaluation.classes import balance_words, own_frequency_labels
from isthmus.evaluation.evaluate import usage_curves
from isthmus.evaluation.features import FeatureNetwork
from isthmus.evaluation.images import ImageSet
from isthmus.evaluation.reference import (
    LabelledFeatures,
    RealFeatures,
    RealSide,
    Reference,
    disjoint_halves,
    images_per_measurement,
)
from isthmus.evaluation.scores import fitting, inception_score_list, score_samples
from isthmus.evaluation.statistics import Gaussian, frechet_distance

N, WIDTH = 40, 4
MEMORY = ("memorised share", "nearer than held-out")


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


def network(spaces=None, logits=None) -> FeatureNetwork:
    return FeatureNetwork(
        lambda images: {}, name="net", spaces=spaces or {"net-4": WIDTH}, preprocessing="", weights_sha256="",
        device=torch.device("cpu"), logits=logits,
    )  # fmt: skip


def rows(seed, count=N, shift=0.0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32) + np.float32(shift)


def two_classes(seed, count, shift=0.0) -> LabelledFeatures:
    labels = np.arange(count) % 2
    return LabelledFeatures(rows(seed, count, shift) + 5 * labels[:, None].astype(np.float32), labels)


def real_side() -> RealSide:
    features = RealFeatures(*({"net-4": some, "logits": some} for some in (rows(1), rows(2), rows(3, shift=4.0))))
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
        score_samples({"net-4": some, "logits": some}, None, REFERENCE, real_side(), network(logits="logits"), ())
        for some in (samples, samples[::-1])
    )
    first, second = ({score.name: score.value for score in found.scores} for found in (one, two))
    for name in ("FD-net-4", "Inception score"):
        assert first[name] == pytest.approx(second[name], rel=1e-6), name
    # the kernel distance draws its subsets by place: another order is another draw of the same estimate
    error = max(score.error or 0 for found in (one, two) for score in found.scores if score.name == "KD-net-4")
    assert abs(first["KD-net-4"] - second["KD-net-4"]) < 2 * error
    assert first["precision"] == second["precision"]
    assert not any("class" in name for name in first), "without labels there are no class scores"


def test_the_inception_score_of_samples_sorted_by_class_is_that_of_mixed_ones():
    """Sure of one of four classes: 4, whatever the order of the file; all three sides have n images."""
    sure = 50 * np.eye(WIDTH, dtype=np.float32)[np.arange(5 * N) % WIDTH]
    unsure, measured = np.zeros((N, WIDTH), np.float32), real_side()
    assert measured.reference is not None
    features = RealFeatures(
        measured.reference.reference | {"logits": unsure},
        measured.reference.other | {"logits": sure[:N]},
        measured.reference.ruined | {"logits": unsure},
    )
    by_class = sure[np.argsort(sure.argmax(axis=1), kind="stable")]
    for logits in (sure, by_class):
        (score,) = inception_score_list({"net-4": rows(6, 5 * N), "logits": logits}, features, network(logits="logits"))
        assert score.value == pytest.approx(4, rel=0.05) and (score.images, score.measurements) == (N, 5)
        assert score.floor == pytest.approx(4, rel=1e-3) and score.ceiling == pytest.approx(1)


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


def test_statistics_beside_images_are_measured_with_all_samples():
    """As ADM's reference batches: the community's number against mu and sigma, everything else against the images."""
    whole, samples = rows(1, 500), rows(6, 3 * N)
    images = ImageSet("batch.npz", "0", None, (), 2 * N, lambda: iter(()))
    reference = Reference("both", "0", images, Gaussian.of(whole))
    found = score_samples({"net-4": samples}, None, reference, real_side(), network(), ())
    scores = {score.name: score for score in found.scores}
    own, to_images = scores["FD-net-4"], scores["FD-net-4 to the images"]
    assert own.value == pytest.approx(frechet_distance(Gaussian.of(samples), Gaussian.of(whole))) and own.floor is None
    assert own.images == 3 * N and "mu and sigma" in own.note
    assert to_images.images == N and to_images.floor is not None and to_images.ceiling is not None
    assert {"KD-net-4", "precision", "recall", "density", "coverage"} <= set(scores)


def test_statistics_of_other_features_leave_the_images_with_a_warning():
    images = ImageSet("batch.npz", "0", None, (), 2 * N, lambda: iter([np.zeros((8, 8, 3), np.uint8)]))
    reference = fitting(Reference("both", "0", images, Gaussian.of(rows(1))), network({"net-7": 7}), (8, 8))
    assert reference.statistics is None and reference.images is images and "mu" not in reference.words
    assert len(reference.warnings) == 1 and "4 wide" in reference.warnings[0]
    other = StatisticsOrigin("net-4", "other weights", "", 500)
    reference = fitting(Reference("both", "0", images, Gaussian.of(rows(1)), origin=other), network(), (8, 8))
    assert reference.statistics is None and "other features" in reference.warnings[0]
    fits = fitting(Reference("both", "0", images, Gaussian.of(rows(1))), network(), (8, 8))
    assert fits.statistics is not None and "only their width" in fits.warnings[0], "the file does not say its features"


def test_statistics_that_say_their_features_are_matched_by_more_than_width():
    ours = StatisticsOrigin("net-4", "", "", 500)
    known = Reference("stats", "0", None, Gaussian.of(rows(1, 500)), origin=ours)
    assert fitting(known, network(), (8, 8)) is known
    for other in ({"space": "net-5"}, {"weights_sha256": "a" * 64}, {"preprocessing": "299 px"}):
        with pytest.raises(UserError, match="stats are of"):
            fitting(replace(known, origin=replace(ours, **other)), network(), (8, 8))


def test_an_inception_score_needs_no_reference_images():
    """Ten splits, as papers have, where a file of statistics gives no n; every split of sure images has all classes."""
    sure = 50 * np.eye(WIDTH, dtype=np.float32)[np.arange(40 * N) % WIDTH]
    reference = Reference("stats", "0", None, Gaussian.of(rows(1, 500)))
    found = score_samples(
        {"net-4": rows(2, 40 * N), "logits": sure}, None, reference, RealSide(None, None, None, ()),
        network(logits="logits"), (),
    )  # fmt: skip
    score = next(one for one in found.scores if one.name == "Inception score")
    assert score.value == pytest.approx(4, rel=0.05) and (score.images, score.measurements) == (4 * N, 10)
    assert score.floor is None and "splits of 160 images" in score.note


def test_notes_name_features_and_samples_that_were_used():
    samples, labels = {"net-4": rows(6, 2 * N + 5)}, np.arange(2 * N + 5) % 2
    scores = score_samples(samples, labels, REFERENCE, real_side(), network(), ("a", "b")).scores
    for one in scores:
        assert "net-4" in one.name + one.note or one.name == "nearer than held-out", one.name
    notes = {one.name: one.note for one in scores}
    assert "used 80 of 85 samples" in notes["FD-net-4"] and "used 80 of 85 samples" in notes["recall"]
    assert "used 85 of 85 samples" in notes["KD-net-4"]


def test_the_ceiling_of_memory_is_what_training_views_score():
    """Half of the views are copies, half are far away: that is what the search finds of true copies."""
    training, held_out = two_classes(4, 300), two_classes(5, 100)
    views = np.concatenate([training.rows[:50], rows(9, 50, shift=30.0)])
    new = held_out.rows[:50]
    real = RealSide(None, training, held_out, (), (views, new), "searched 300 of 600 training images")
    reference = Reference("stats", "0", None, Gaussian.of(rows(1, 500)))
    found = score_samples({"net-4": training.rows[:40]}, None, reference, real, network(), ())
    share, nearer = (next(one for one in found.scores if one.name == name) for name in MEMORY)
    assert (share.value, share.floor, share.ceiling) == (1.0, 0.01, 0.5) and "300 of 600" in share.note
    assert (nearer.value, nearer.ceiling) == (1.0, 0.5) and nearer.floor == pytest.approx(0.5, abs=0.1)
    assert share.low is not None and share.low < 0.95, "all of 40 leave room"


def test_few_samples_for_statistics_are_warned_of_in_the_space_that_is_measured():
    both, reference = network({"wide": 100, "net-4": WIDTH}), Reference("stats", "0", None, Gaussian.of(rows(1, 500)))
    real = RealSide(None, None, None, ())
    found = score_samples({"wide": np.zeros((N, 100), np.float32), "net-4": rows(2)}, None, reference, real, both, ())
    assert not any("rank" in warning for warning in found.warnings), "40 images are enough for 4 columns"


def test_held_out_images_that_repeat_training_images_are_said():
    training = two_classes(4, 30)
    real = RealSide(real_side().reference, training, LabelledFeatures(training.rows[:12], training.labels[:12]), ())
    samples = np.concatenate([training.rows[:10], rows(6, N - 10, shift=9.0)])
    found = score_samples({"net-4": samples, "logits": samples}, None, REFERENCE, real, network(), ())
    assert any("equal a training image" in warning for warning in found.warnings)
    assert next(one for one in found.scores if one.name == "memorised share").value == pytest.approx(10 / N)
    assert found.neighbours is not None and found.neighbours.index[:10].tolist() == list(range(10))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3))
def test_balance_in_words_depends_on_the_frequencies_alone(labels, times):
    names, data = ("a", "b", "c", "d"), np.array([3, 1, 1, 1])
    labels = np.array(labels)
    assert balance_words(labels, names, data) == balance_words(labels[::-1], names, data)
    drawn = own_frequency_labels(6 * times, data)
    assert balance_words(np.sort(drawn), names, data) == "classes as often as in the data"
    assert balance_words(np.repeat(np.arange(4), times), names, data) == "every class equally often"


def test_usage_of_codes_by_hand():
    used, perplexity = usage_curves(np.array([[0, 1, 2], [0, 3, 3]]), {"first": 1, "second": 2}, 4)
    assert used.positions == perplexity.positions == ("first", "second")
    assert used.values == (0.25, 0.75)
    assert perplexity.values == pytest.approx((1.0, 2**1.5))
