import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.next_scale.refinement import ScaleRefinementScheduler, lowest_share


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    share=st.floats(0.01, 1.0),
)
def test_the_lowest_share_is_the_lowest(values, share):
    row = torch.tensor([values])
    hidden = lowest_share(row, share)
    assert int(hidden.sum()) == math.ceil(share * len(values) - 1e-9)
    if not bool(hidden.all()):
        assert row[hidden].max() <= row[~hidden].min()


@given(rows=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6), min_size=2, max_size=4))
def test_a_row_is_chosen_from_its_own_values(rows):
    together = lowest_share(torch.tensor(rows), 0.4)
    for i, row in enumerate(rows):
        assert torch.equal(lowest_share(torch.tensor([row]), 0.4)[0], together[i])


def test_p_min_hides_what_is_less_probable():
    scheduler = ScaleRefinementScheduler(mode="masked", p_min=0.2)
    assert scheduler.hidden_by_probability(torch.tensor([[0.1, 0.2, 0.9]])).tolist() == [[True, False, False]]


def test_rounds_have_defaults_and_fill_up():
    assert ScaleRefinementScheduler().rounds_of(5) == (0,) * 5
    assert ScaleRefinementScheduler(mode="masked").rounds_of(6) == (0, 1, 1, 1, 0, 0)
    assert ScaleRefinementScheduler(mode="masked").rounds_of(2) == (0, 1)
    assert ScaleRefinementScheduler(mode="simple").rounds_of(6) == (0, 0, 1, 1, 0, 0)
    assert ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 0)).rounds_of(2) == (0, 2)


def test_what_is_saved_comes_back(tmp_path):
    made = ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 2), jump_scales=1)
    made.save_pretrained(tmp_path)
    back = ScaleRefinementScheduler.from_pretrained(tmp_path)
    assert back.mode == "simple" and back.rounds_of(4) == (0, 0, 2, 0) and back.jump_scales == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "masked", "p_min": 0.0}, r"p_min.*\(0, 1\)"),
        ({"mode": "masked", "p_min": 1.0}, r"p_min.*\(0, 1\)"),
        ({"mode": "masked", "p_min": float("nan")}, r"p_min.*\(0, 1\)"),
        ({"mode": "masked", "share": 0.0}, r"share must lie in \(0, 1\]"),
        ({"mode": "masked", "share": 1.5}, r"share must lie in \(0, 1\]"),
        ({"mode": "masked", "share": 0.2, "p_min": 0.1}, "one of them"),
        ({"mode": "masked", "rounds": (1, 0)}, "0 for the first"),
        ({"mode": "masked", "rounds": (0, -1)}, "0 or more"),
        ({"mode": "masked", "jump_scales": 2}, "has no jump_scales"),
        ({"mode": "simple", "p_min": 0.1}, "has no p_min"),
        ({"mode": "simple", "share": 0.1}, "has no share"),
        ({"mode": "none", "rounds": (0, 1)}, "has no rounds"),
        ({"mode": "simple", "jump_scales": 0}, "at least 1"),
        ({"mode": "simple", "rounds": (0, 1)}, "keep at least the first"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        ScaleRefinementScheduler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "num_scales"),
    [
        ({"mode": "masked"}, 1),
        ({"mode": "masked", "rounds": (0, 0)}, 4),
        ({"mode": "simple"}, 2),
        ({"mode": "simple", "jump_scales": 4}, 6),
        ({"mode": "masked", "rounds": ()}, 3),
    ],
)
def test_a_mode_without_a_round_is_refused(arguments, num_scales):
    with pytest.raises(UserError, match="no round"):
        ScaleRefinementScheduler(**arguments).rounds_of(num_scales)


def test_rounds_of_a_scale_that_does_not_exist():
    with pytest.raises(UserError, match="does not exist"):
        ScaleRefinementScheduler(mode="masked", rounds=(0, 1, 1, 1)).rounds_of(3)
