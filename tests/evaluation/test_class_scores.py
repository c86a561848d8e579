import numpy as np
import pytest

from isthmus.errors import UserError
from isthmus.evaluation import classes as class_scores
from isthmus.evaluation.classes import (
    LinearProbe,
    NearestClassMean,
    accuracy_by_class,
    inception_score,
    intra_class_diversity,
)
from isthmus.evaluation.features import extract_features, feature_network
from tests.evaluation.photo_crops import photo_crops

KINDS = (NearestClassMean, LinearProbe)


def test_class_means_by_hand():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0]])
    means = NearestClassMean.fit(features, np.array([7, 7, 3]))
    np.testing.assert_array_equal(means.classes, [3, 7])
    np.testing.assert_array_equal(means.means, [[10.0, 0.0], [1.0, 0.0]])
    # the border between 1 and 10 lies at 5.5
    np.testing.assert_array_equal(means.predict(np.array([[5.4, 0.0], [5.6, 0.0]])), [7, 3])


@pytest.mark.slow
def test_photographs_are_told_apart_on_their_unseen_halves():
    network, names, labels = feature_network("lite0"), ("chelsea", "coffee", "rocket"), np.repeat(np.arange(3), 12)
    seen, unseen = (
        extract_features(network, np.concatenate([photo_crops(n, 12, left_half=half) for n in names]))["lite0-192"]
        for half in (True, False)
    )
    for kind in KINDS:
        assert (kind.fit(seen, labels).predict(unseen) == labels).mean() > 0.75


def test_the_probe_sees_what_means_do_not():
    """Two classes with means close together along a quiet axis, lost among loud ones."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    features = rng.normal(size=(1000, 6)) * np.array([1, 100, 100, 100, 100, 100])
    features[:, 0] += 6 * labels
    probe = LinearProbe.fit(features[::2], labels[::2], ridge=1e-4)
    assert (probe.predict(features[1::2]) == labels[1::2]).mean() > 0.99
    means = NearestClassMean.fit(features[::2], labels[::2])
    assert (means.predict(features[1::2]) == labels[1::2]).mean() < 0.9


def test_the_probe_solves_the_normal_equations():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(12, 20)), np.arange(12) % 3
    probe = LinearProbe.fit(features, labels)
    rows, targets = features - features.mean(0), np.eye(3)[labels] - 1 / 3
    penalty = 0.1 * rows.var(axis=0).mean() * 12
    expected = np.linalg.solve(rows.T @ rows + penalty * np.eye(20), rows.T @ targets)
    np.testing.assert_allclose(probe.weights, expected, atol=1e-12)


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(60, 20)), np.arange(60) % 3

    def measured():
        means, probe = NearestClassMean.fit(rows, labels), LinearProbe.fit(rows, labels)
        right = [means.predict(rows).tolist(), probe.predict(rows).tolist()]
        return right, probe.weights, intra_class_diversity(rows, labels), inception_score(rows)

    whole = measured()
    # a block of its own size holds all of these rows, and sets that fill several take seconds
    monkeypatch.setattr(class_scores, "_BLOCK_ROWS", 7)
    parts = measured()
    assert parts[0] == whole[0]
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-12)
    assert parts[2] == pytest.approx(whole[2]) and parts[3] == pytest.approx(whole[3])


def test_classifiers_do_not_depend_on_the_order_of_images():
    rng = np.random.default_rng(0)
    features, labels, order = rng.normal(size=(30, 4)), rng.integers(0, 3, 30), rng.permutation(30)
    for kind in KINDS:
        one, other = kind.fit(features, labels), kind.fit(features[order], labels[order])
        np.testing.assert_array_equal(one.predict(features), other.predict(features))


def test_what_cannot_be_fitted_is_refused():
    for kind in KINDS:
        with pytest.raises(UserError, match="at least one labelled image"):
            kind.fit(np.zeros((0, 2)), np.zeros(0, int))
    with pytest.raises(UserError, match="ridge"):
        LinearProbe.fit(np.zeros((2, 2)), np.array([0, 1]), ridge=0)


def test_accuracy_by_class_averages_to_the_accuracy():
    rng = np.random.default_rng(0)
    right, labels = rng.random(60) < 0.5, np.repeat([0, 4, 9], 20)
    assert np.mean(list(accuracy_by_class(right, labels).values())) == pytest.approx(right.mean())


def test_diversity_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(9, 3)), np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    pairs = [np.linalg.norm(rows[i] - rows[j]) for i in range(4) for j in range(4) if i < j]
    found = intra_class_diversity(rows, labels)
    assert set(found) == {0, 1}
    assert found[0] == pytest.approx(np.mean(pairs))
    assert intra_class_diversity(np.repeat(rows[:1], 3, axis=0), np.zeros(3, int)) == {0: 0.0}


def test_inception_scores_at_both_ends():
    # every image sure of a class of its own, all classes equally often: the number of classes; unsure images: 1
    sure = np.tile(1000 * np.eye(5), (4, 1))
    assert inception_score(sure) == pytest.approx(5)
    assert inception_score(np.zeros((20, 5))) == pytest.approx(1)
