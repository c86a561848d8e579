import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.next_scale.sampling import null_row_scales
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.options import (
    FOLDER_DEFAULT,
    SamplingOptions,
    SmoothSchedule,
    guidance_on,
    guidance_text,
    parse_guidance,
    parse_smooth,
    smooth_text,
)


def test_options_survive_json():
    for guidance in (1, 2.5, [1.0, 2.0, 3.0], GuidanceSchedule("cosine", 1.0, 4.0, 1)):
        options = SamplingOptions(guidance_scale=guidance, top_k=5, top_p=0.9, temperature=0.7, smooth=True)
        assert SamplingOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
        assert "first_guided_step" not in json.dumps(options.to_dict())
    late = SamplingOptions(
        guidance_scale=GuidanceSchedule("linear", 1.0, 7.0, 7, 2),
        temperature=[1, 0.1],
        smooth=SmoothSchedule(2, 7, filtered=False),
    )
    assert SamplingOptions.from_dict(json.loads(json.dumps(late.to_dict()))) == late
    assert late.words() == "guidance linear:1:7:2-7, temperature 1,0.1, smooth 2-7:unfiltered"
    with pytest.raises(UserError, match="'topk'"):
        SamplingOptions.from_dict({"topk": 3})


def test_none_turns_off_and_the_folder_default_stays():
    saved = SamplingOptions(top_k=9, top_p=0.9)
    assert saved.override(top_k=None, top_p=FOLDER_DEFAULT) == SamplingOptions(top_p=0.9)


def test_guidance_as_text():
    for text, value in [
        ("1.5", 1.5),
        ("linear:1:2.5", GuidanceSchedule("linear", 1.0, 2.5)),
        ("cosine:1:4:2", GuidanceSchedule("cosine", 1.0, 4.0, 2)),
        ("linear:1:7:2-7", GuidanceSchedule("linear", 1.0, 7.0, 7, 2)),
        ("linear:1:7:2-", GuidanceSchedule("linear", 1.0, 7.0, None, 2)),
        ("1,2,3", (1.0, 2.0, 3.0)),
    ]:
        assert parse_guidance(text) == value
    for text in (
        "",
        "two",
        "linear",
        "linear:1",
        "square:1:2",
        "nan",
        "linear:1:nan",
        "1,x",
        "linear:1:2:",
        "linear:1:2:2-x",
        "linear:1:2:7-2",
    ):
        with pytest.raises(UserError):
            SamplingOptions(guidance_scale=parse_guidance(text))


def test_a_shortened_schedule_is_guided_as_its_parent_is_at_every_side():
    parent = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    schedule = GuidanceSchedule("linear", 1.0, 10.0)
    assert guidance_on(schedule, (1, 3, 5, 8, 13, 16), parent) == (1.0, 3.0, 5.0, 7.0, 9.0, 10.0)
    assert guidance_on(2.0, (1, 16), parent) == (2.0, 2.0)
    assert guidance_on((1.0, 3.0), (1, 16), parent) == (1.0, 3.0)


def test_where_null_rows_run():
    guidance = (1.0, 1.0, 2.0, 1.0, 3.0, 1.0)
    assert null_row_scales(guidance, markov=True) == (False, False, True, False, True, False)
    assert null_row_scales(guidance, markov=False) == (True, True, True, True, True, False)
    assert null_row_scales((1.0, 1.0), markov=False) == (False, False)


@given(
    st.one_of(
        st.floats(0, 50),
        st.lists(st.floats(0, 50), min_size=2, max_size=5).map(tuple),
        st.builds(
            GuidanceSchedule,
            st.sampled_from(["constant", "linear", "cosine"]),
            st.floats(0, 50),
            st.floats(0, 50),
            st.none() | st.integers(5, 9),
            st.integers(0, 5),
        ),
    )
)
def test_written_guidance_is_read_as_it_was(guidance):
    assert parse_guidance(guidance_text(guidance)) == guidance


def test_smoothing_as_text():
    for smooth in (SmoothSchedule(), SmoothSchedule(2, 7, filtered=False), SmoothSchedule(1)):
        assert parse_smooth(smooth_text(smooth)) == smooth
    for text in ("", "2", "x-3", "3-2", "1-2:filtered"):
        with pytest.raises(UserError, match="smoothing"):
            parse_smooth(text)


def test_filters_have_their_ranges():
    for filters in ({"top_k": 16, "top_p": 1.0, "temperature": 0.1}, {}):
        SamplingOptions(**filters).check(codebook_size=16, num_steps=3)
    for filters, said in [
        ({"top_k": 0}, "top_k must be 1..16"),
        ({"top_k": 17}, "top_k must be 1..16"),
        ({"guidance_scale": (2.0, 2.0)}, r"one value per step \(3\)"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"guidance_scale": math.inf}, "finite"),
        ({"guidance_scale": [1.0, math.nan]}, "finite"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": (1.0, 0.0, 1.0)}, "temperature"),
        ({"temperature": (1.0, 0.1)}, r"one value per scale \(3\)"),
    ]:
        with pytest.raises(UserError, match=said):
            SamplingOptions(**filters).check(codebook_size=16, num_steps=3)
