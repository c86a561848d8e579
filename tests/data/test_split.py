import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.source import held_out

CONTENTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=60)


def digest(content: int) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()


@given(pairs=CONTENTS, fraction=st.floats(0, 0.99))
def test_equal_contents_stay_together_and_every_class_keeps_an_image(pairs, fraction):
    hashes = [digest(content) for content, _ in pairs]
    labels = np.array([label for _, label in pairs])
    mask = held_out(hashes, labels, fraction, source="test")
    sides = {content: set() for content in hashes}
    for content, side in zip(hashes, mask, strict=True):
        sides[content].add(bool(side))
    assert all(len(side) == 1 for side in sides.values())
    assert all((~mask[labels == label]).any() for label in np.unique(labels))


@given(order=st.permutations(range(40)))
def test_neither_order_nor_company_moves_an_image(order):
    hashes = [digest(i) for i in range(40)]
    labels = np.zeros(40, dtype=np.int64)
    all_at_once = held_out(hashes, labels, 0.3, source="test")
    shuffled = held_out([hashes[i] for i in order], labels, 0.3, source="test")
    assert (shuffled == all_at_once[list(order)]).all()
    more = held_out(hashes + [digest(i) for i in range(40, 80)], np.zeros(80, dtype=np.int64), 0.3, source="test")
    assert (more[:40] == all_at_once).all()


def test_the_fraction_is_about_right():
    hashes = [digest(i) for i in range(4000)]
    mask = held_out(hashes, np.zeros(4000, dtype=np.int64), 0.1, source="test")
    # binomial: 400 +- 19; five standard deviations
    assert abs(mask.sum() - 400) < 95


def test_three_images_hold_one_out():
    mask = held_out([digest(i) for i in range(3)], np.zeros(3, dtype=np.int64), 0.1, source="test")
    assert mask.sum() == 1


def test_one_image_per_class_holds_none_out_and_says_so(caplog):
    mask = held_out([digest(i) for i in range(3)], np.arange(3), 0.1, source="test")
    assert not mask.any() and "too few images" in caplog.text
