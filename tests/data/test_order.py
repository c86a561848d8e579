import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.batches import SampleOrder
from isthmus.errors import UserError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)


@given(labels=LABELS, seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_every_epoch_shows_every_image_once(labels, seed, epoch):
    n = len(labels)
    indices, visits = SampleOrder(labels, seed=seed, balanced=False).locate(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(indices.tolist()) == list(range(n))
    assert set(visits.tolist()) == {epoch}


@given(labels=LABELS, seed=st.integers(0, 99))
def test_balanced_shows_every_class_once_per_block_and_every_image_of_it_in_turn(labels, seed):
    classes = sorted(set(labels.tolist()))
    blocks = 3 * len(labels)
    indices, visits = SampleOrder(labels, seed=seed, balanced=True).locate(np.arange(blocks * len(classes)))
    shown = labels[indices].reshape(blocks, len(classes))
    assert (np.sort(shown, axis=1) == classes).all()
    for label in classes:
        of_class = labels[indices] == label
        members = np.flatnonzero(labels == label)
        walk = indices[of_class][: 2 * len(members)].reshape(2, len(members))
        assert (np.sort(walk, axis=1) == members).all()
        assert visits[of_class][: 2 * len(members)].tolist() == [0] * len(members) + [1] * len(members)


@given(labels=LABELS, balanced=st.booleans(), positions=st.lists(st.integers(0, 10**6), max_size=30))
def test_a_position_is_answered_alike_in_any_order_and_company(labels, balanced, positions):
    order = SampleOrder(labels, seed=3, balanced=balanced)
    together = order.locate(np.array(positions, dtype=np.int64))[0].tolist()
    alone = [int(SampleOrder(labels, seed=3, balanced=balanced).locate(np.array([p]))[0][0]) for p in positions]
    assert together == alone


def test_seeds_and_epochs_differ():
    labels = np.zeros(50, dtype=np.int64)
    first = SampleOrder(labels, seed=0, balanced=False).locate(np.arange(100))[0]
    other = SampleOrder(labels, seed=1, balanced=False).locate(np.arange(100))[0]
    assert (first[:50] != first[50:]).any() and (first != other).any()


@pytest.mark.slow
def test_many_classes_and_rotations_are_shuffled():
    labels = np.arange(1000).repeat(2)
    indices, _ = SampleOrder(labels, seed=0, balanced=True).locate(np.arange(10_000))
    blocks = labels[indices].reshape(10, 1000)
    assert (np.sort(blocks, axis=1) == np.arange(1000)).all()
    assert (blocks[0] != blocks[1]).any()


def test_positions_count_from_zero():
    with pytest.raises(UserError, match="-1"):
        SampleOrder(np.zeros(3, dtype=np.int64), seed=0, balanced=False).locate(np.array([-1]))
