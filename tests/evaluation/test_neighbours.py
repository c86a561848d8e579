import tracemalloc

import numpy as np
import pytest

from isthmus.errors import UserError
from isthmus.evaluation.guards import check_copy_distance
from isthmus.evaluation.neighbours import (
    copies,
    copy_distance,
    manifold_scores,
    nearer_than,
    nearest_neighbours,
    neighbour_distances,
)


def normal(count: int, *, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8)) + shift


def means(samples: np.ndarray, real: np.ndarray, **options) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in vars(manifold_scores(samples, real, **options)).items()}


def memorised(samples: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Which samples count as copies."""
    threshold = copy_distance(nearest_neighbours(held_out, training)[1])
    return copies(nearest_neighbours(samples, training)[1], threshold)


def test_four_points_on_a_line_by_hand():
    # k = 1: balls of radius 1 around 0 and 1, of radius 9 around 10
    real, samples = np.array([[0.0], [1.0], [10.0]]), np.array([[0.5], [2.5], [20.0]])
    found = manifold_scores(samples, real, precision_k=1, density_k=1)
    assert found.precision.tolist() == [1, 1, 0]
    assert found.density.tolist() == [2.0, 1.0, 0.0]
    assert found.coverage.tolist() == [1, 1, 1]
    # balls of the samples: radii 2, 2 and 17.5
    assert found.recall.tolist() == [1, 1, 1]


def test_constructed_sets():
    real = normal(200, seed=0)
    assert means(real, real)["precision"] == means(real, real)["recall"] == means(real, real)["coverage"] == 1
    far = means(normal(200, seed=1, shift=100.0), real)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    one_mode = np.concatenate([real[:100], real[:100] + 1e-6])
    two_modes = np.concatenate([real[:100], normal(100, seed=2, shift=100.0)])
    collapsed = means(one_mode, two_modes)
    assert collapsed["precision"] == 1 and collapsed["recall"] <= 0.5 and collapsed["coverage"] <= 0.5
    assert means(normal(400, seed=3), normal(400, seed=4))["density"] == pytest.approx(1, abs=0.2)


def test_blocks_and_order_change_nothing():
    samples, real = normal(40, seed=0), normal(50, seed=1, shift=0.5)
    expected = means(samples, real)
    for size in (1, 7, 1000):
        assert means(samples[::-1].copy(), real, block_size=size) == pytest.approx(expected)
        assert means(samples, real[::-1].copy(), block_size=size) == pytest.approx(expected)


def test_neighbour_distances_are_those_of_all_pairs():
    rows = normal(20, seed=0, shift=1000.0)
    every = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    np.testing.assert_allclose(neighbour_distances(rows, k=3), np.sort(every, axis=1)[:, 1:4], rtol=1e-6)
    assert (neighbour_distances(np.repeat(rows, 2, axis=0), k=1) == 0).all()


def test_nearest_neighbours_in_blocks():
    queries, references = normal(6, seed=0), normal(10, seed=1)
    every = np.linalg.norm(queries[:, None] - references[None], axis=-1)
    for size in (1, 3, 100):
        index, distance = nearest_neighbours(queries, references, block_size=size)
        np.testing.assert_array_equal(index, every.argmin(axis=1))
        np.testing.assert_allclose(distance, every.min(axis=1))
        index, distance = nearest_neighbours(references[2:5], references, block_size=size)
        assert index.tolist() == [2, 3, 4] and (distance == 0).all()


def test_copies_are_at_distance_zero_in_single_precision_too():
    references = (normal(50, seed=0) * 1e3 + 1e5).astype(np.float32)
    index, distance = nearest_neighbours(references[10:20], references)
    assert index.tolist() == list(range(10, 20)) and (distance == 0).all()


def test_copies_count_as_memorised_and_new_images_do_not():
    rng = np.random.default_rng(1)
    training, held_out, fresh = (rng.normal(size=(200, 16)) for _ in range(3))
    assert memorised(training[:50], training, held_out).all()
    assert memorised(fresh, training, held_out).mean() < 0.05
    half_copied = np.concatenate([training[:100] + 1e-3, fresh[:100]])
    assert memorised(half_copied, training, held_out).mean() == pytest.approx(0.5, abs=0.05)


def test_copies_count_where_held_out_images_repeat_training_images():
    """The threshold is 0 then: exact copies are copies, new images are not."""
    training, fresh = normal(100, seed=0), normal(20, seed=1)
    held_out = np.concatenate([training[:5], normal(95, seed=2)])
    assert copy_distance(nearest_neighbours(held_out, training)[1]) == 0
    assert check_copy_distance(0.0) is not None
    assert memorised(np.concatenate([training[:20], fresh]), training, held_out).tolist() == [True] * 20 + [False] * 20


def test_copies_that_were_moved_are_seen_by_their_whole_law():
    """None is near enough to count alone, together they are nearer than held-out images are."""
    training, held_out, fresh = (normal(300, seed=seed) for seed in (1, 2, 3))
    moved = training + normal(300, seed=4) / 8**0.5
    theirs = nearest_neighbours(held_out, training)[1]
    distances = nearest_neighbours(moved, training)[1]
    assert nearer_than(distances, theirs).mean() > 0.8
    assert nearer_than(nearest_neighbours(fresh, training)[1], theirs).mean() == pytest.approx(0.5, abs=0.06)
    assert nearer_than(theirs, theirs).mean() == pytest.approx(0.5)
    assert copy_distance(theirs) < np.median(distances)


@pytest.mark.slow
def test_features_are_not_copied_in_double_precision():
    """Of n x 2,048 single-precision features only blocks are in float64."""
    rows = np.zeros((4096, 512), np.float32)
    rows[:, 0] = np.arange(4096)
    tracemalloc.start()
    index, distance = nearest_neighbours(rows + np.float32(0.25), rows, block_size=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(index, np.arange(4096)) and np.allclose(distance, 0.25 * 512**0.5)
    # the queries' own sum is made inside the call; a float64 copy of either side would be 16 MiB more
    assert peak < 1.6 * rows.nbytes


def test_what_has_no_neighbours_is_refused():
    for samples, real in ((10, 5), (3, 10)):
        with pytest.raises(UserError, match="neighbours need more than"):
            manifold_scores(normal(samples, seed=0), normal(real, seed=1))
