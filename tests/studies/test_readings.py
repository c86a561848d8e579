"""The rule behind verdicts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.studies.tables import Difference, Reading, difference, half_width_of_mean

VALUES = st.floats(-1e3, 1e3)


def test_students_interval_of_three_values_by_hand():
    # mean 2, deviation 1: 4.303 / sqrt(3), the point from a printed table
    assert half_width_of_mean([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)


def test_with_several_seeds_only_the_gaps_of_equal_seeds_count():
    """The seeds differ by 10 and the sides by 1 to 1.2: paired, that is certain; unpaired it would not be."""
    first = {0: Reading(0.0), 1: Reading(10.0), 2: Reading(20.0)}
    second = {0: Reading(1.0), 1: Reading(11.1), 2: Reading(21.2)}
    found = difference(first, second)
    assert found.value == pytest.approx(-1.1) and found.num_seeds == 3
    assert found.verdict("lower") == "agrees" and found.verdict("higher") == "does not agree"


def test_seeds_that_one_side_lacks_do_not_count():
    found = difference({0: Reading.around(1.0, 0.1), 5: Reading(9.0)}, {0: Reading.around(2.0, 0.1)})
    assert (found.value, found.num_seeds) == (-1.0, 1)
    assert found.half_width == pytest.approx(math.hypot(0.1, 0.1))
    assert difference({0: Reading(1.0)}, {1: Reading(1.0)}).num_seeds == 0


def test_with_one_seed_groups_of_the_same_images_are_subtracted():
    """Groups differ by 10 and the sides by 1 in each: paired, that is certain; apart it would not be."""
    groups = [10.0 * group for group in range(20)]
    first = {0: Reading.around(95.0, 26.0)}
    paired = difference(
        {0: Reading(95.0, 69.0, 121.0, tuple(groups))},
        {0: Reading(96.0, 70.0, 122.0, tuple(one + 1 for one in groups))},
    )
    assert paired.half_width == pytest.approx(0.0) and paired.verdict("lower") == "agrees"
    assert difference(first, {0: Reading.around(96.0, 26.0)}).verdict("lower") == "cannot tell"
    # of several seeds the trainings count, whatever their images say
    seeds = {seed: Reading(95.0, parts=tuple(groups)) for seed in (0, 1)}
    assert difference(seeds, {0: Reading(96.0), 1: Reading(99.0)}).half_width == half_width_of_mean([-1.0, -4.0])


def test_one_seed_needs_an_interval_that_lies_on_one_side():
    for half_width, verdict in ((None, "cannot tell"), (1.0, "cannot tell"), (0.9, "agrees")):
        assert Difference(-1.0, half_width, 1).verdict("lower") == verdict


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=6), st.sampled_from(["lower", "higher"]))
def test_swapping_the_sides_swaps_the_verdict(pairs, direction):
    ours = {i: Reading(a) for i, (a, _) in enumerate(pairs)}
    theirs = {i: Reading(b) for i, (_, b) in enumerate(pairs)}
    there, back = difference(ours, theirs), difference(theirs, ours)
    swapped = {"agrees": "does not agree", "does not agree": "agrees", "cannot tell": "cannot tell"}
    assert back.verdict(direction) == swapped[there.verdict(direction)]
