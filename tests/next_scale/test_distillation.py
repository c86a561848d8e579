from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.next_scale.distillation import check_student_sizes, nearest_sizes, removal_stages, shared_steps
from isthmus.next_scale.transformer import sampling_flops, visible_pairs

OFFICIAL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PAPER = (1, 3, 5, 8, 13, 16)
BLOCK = {
    "width": 1024,
    "num_layers": 16,
    "mlp_ratio": 4.0,
    "codebook_size": 4096,
    "codebook_dim": 32,
    "shared_adaln": False,
}


@st.composite
def schedules(draw):
    """A teacher's sides and some of them, both ends included."""
    teacher = tuple(sorted(draw(st.sets(st.integers(1, 32), min_size=2, max_size=9))))
    middle = draw(st.sets(st.sampled_from(teacher)))
    return teacher, tuple(sorted(middle | {teacher[0], teacher[-1]}))


@given(schedules())
def test_any_part_with_both_ends_is_a_student(pair):
    teacher, sizes = pair
    assert check_student_sizes(teacher, list(sizes)) == sizes == nearest_sizes(teacher, sizes)


@given(schedules(), st.lists(st.integers(-3, 40), max_size=6))
def test_what_is_advised_is_accepted(pair, asked):
    teacher, _ = pair
    advised = nearest_sizes(teacher, asked)
    assert check_student_sizes(teacher, advised) == advised


def test_other_schedules_are_refused_with_advice():
    for sizes in [(), (1,), (16,), (1, 7, 16), (2, 16), (1, 3, 13), (1, 5, 3, 16), (1, 3, 3, 16)]:
        with pytest.raises(UserError, match=r"Nearest: 1,[\d,]*16\."):
            check_student_sizes(OFFICIAL, sizes)


@given(schedules())
def test_scales_go_one_at_a_time_the_finest_first(pair):
    teacher, sizes = pair
    stages = removal_stages(teacher, sizes)
    removed = [set(a) - set(b) for a, b in pairwise((teacher, *stages))]
    assert stages[-1] == sizes
    if sizes != teacher:
        assert all(len(one) == 1 for one in removed)
        sides = [one.pop() for one in removed]
        assert sides == sorted(sides, reverse=True)


@given(schedules())
def test_a_teacher_is_asked_where_it_knows_the_input(pair):
    teacher, sizes = pair
    markov, causal = (shared_steps(teacher, sizes, markov=mask) for mask in (True, False))
    assert markov[0] == causal[0] == 0 and set(causal) <= set(markov)
    for k in markov[1:]:
        assert teacher.index(sizes[k]) == teacher.index(sizes[k - 1]) + 1
    assert causal == tuple(k for k in range(len(sizes)) if sizes[: k + 1] == teacher[: k + 1])
    assert all(len(shared_steps(teacher, teacher, markov=mask)) == len(teacher) for mask in (True, False))


# spec of SRDD, 2: the published d16 at 256 px
@pytest.mark.parametrize(
    "sizes, markov, pairs, gflop",
    [(OFFICIAL, False, 286_434, 298), (OFFICIAL, True, 110_468, 287), (PAPER, True, 98_900, 222)],
)
def test_cost_of_the_published_model(sizes, markov, pairs, gflop):
    assert visible_pairs(sizes, markov=markov) == pairs
    asked = {"scale_sizes": sizes, "scale_attention": "markov" if markov else "causal"}
    assert sampling_flops(BLOCK | asked) / 1e9 == pytest.approx(gflop, abs=1)
