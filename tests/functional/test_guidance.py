import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.nn.guidance import GuidanceSchedule, guidance_values

SCALES = st.floats(-5, 10)


@given(SCALES, SCALES, st.integers(2, 12), st.sampled_from(["linear", "cosine"]))
def test_ramps_go_from_start_to_end(start, end, steps, kind):
    values = GuidanceSchedule(kind, start, end).values(steps)
    assert values[0] == pytest.approx(start) and values[-1] == pytest.approx(end)
    rising = sorted(values, reverse=end < start)
    assert values == pytest.approx(rising)


@given(SCALES, SCALES, st.sampled_from(["constant", "linear", "cosine"]))
def test_one_step_alone_takes_the_end(start, end, kind):
    assert GuidanceSchedule(kind, start, end).values(1) == pytest.approx((end,))


def test_shapes_by_hand():
    assert GuidanceSchedule("constant", 1.0, 3.0).values(3) == (3.0, 3.0, 3.0)
    assert GuidanceSchedule("linear", 1.0, 3.0).values(3) == (1.0, 2.0, 3.0)
    half = 1 + 2 * (1 - math.cos(math.pi / 4)) / 2
    assert GuidanceSchedule("cosine", 1.0, 3.0).values(5)[1] == pytest.approx(half)


def test_nothing_is_guided_after_the_last_guided_step():
    assert GuidanceSchedule("constant", end=3.0, last_guided_step=1).values(4) == (3.0, 3.0, 1.0, 1.0)


def test_a_number_and_a_sequence():
    assert guidance_values(2, 3) == (2.0, 2.0, 2.0)
    assert guidance_values([1.0, 2.0], 2) == (1.0, 2.0)
    schedule = GuidanceSchedule("linear", 1.0, 2.0)
    assert guidance_values(schedule, 2) == schedule.values(2)


def test_a_schedule_survives_json():
    schedule = GuidanceSchedule("cosine", 1.0, 4.0, last_guided_step=5)
    assert GuidanceSchedule(**json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert set(schedule.to_dict()) == {field.name for field in dataclasses.fields(schedule)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number(value):
    for call in (
        lambda: guidance_values(value, 2),
        lambda: guidance_values([1.0, value], 2),
        lambda: GuidanceSchedule("linear", 1.0, value),
    ):
        with pytest.raises(UserError, match="finite"):
            call()


def test_a_sequence_of_another_length():
    with pytest.raises(UserError, match=r"one value per step \(3\), got 2"):
        guidance_values([1.0, 2.0], 3)
