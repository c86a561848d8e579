import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.nn.guidance import GuidanceSchedule, guidance_values
from isthmus.nn.sampling import (
    draw_tokens,
    filter_logits,
    guided_logits,
    smooth_temperature,
    smooth_weights,
)

LARGEST_UNIFORM = 1 - 2**-24


@st.composite
def logits_of(draw, max_rows=4):
    """(rows, codes) logits, a good part of them tied."""
    rows, codes = draw(st.integers(1, max_rows)), draw(st.integers(1, 12))
    value = st.one_of(st.integers(-3, 3).map(float), st.floats(-30, 30, width=32))
    flat = draw(st.lists(value, min_size=rows * codes, max_size=rows * codes))
    return torch.tensor(flat, dtype=torch.float32).view(rows, codes)


TOP_P = st.floats(0.01, 1.0)


def kept(filtered):
    return torch.isfinite(filtered)


@given(logits_of())
def test_filters_that_are_off_change_nothing(logits):
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_k=logits.shape[-1], top_p=1.0), logits)


@given(logits_of(), st.data(), st.one_of(st.none(), TOP_P))
def test_filters_do_not_modify_their_input(logits, data, top_p):
    before = logits.clone()
    filtered = filter_logits(logits, top_k=data.draw(st.integers(1, logits.shape[-1])), top_p=top_p)
    assert torch.equal(logits, before)
    assert torch.equal(filtered[kept(filtered)], logits[kept(filtered)])
    assert (filtered[~kept(filtered)] == -math.inf).all()


@given(logits_of(), st.data(), st.one_of(st.none(), TOP_P))
def test_a_largest_code_is_always_kept(logits, data, top_p):
    top_k = data.draw(st.one_of(st.none(), st.integers(1, logits.shape[-1])))
    filtered = filter_logits(logits, top_k=top_k, top_p=top_p)
    assert torch.equal(filtered.amax(dim=-1), logits.amax(dim=-1))


@given(logits_of(), st.data())
def test_top_k_keeps_what_is_not_below_the_kth_largest(logits, data):
    top_k = data.draw(st.integers(1, logits.shape[-1]))
    threshold = logits.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k]
    assert torch.equal(kept(filter_logits(logits, top_k=top_k)), logits >= threshold)


def nucleus_by_hand(row: torch.Tensor, top_p: float) -> set[int]:
    """Indices kept: from the smallest up (lower index first among equals), dropped while the sum is <= 1 - p."""
    probabilities = row.double().softmax(dim=-1).tolist()
    order = sorted((i for i in range(len(row)) if row[i] > -math.inf), key=lambda i: (float(row[i]), i))
    total, survivors = 0.0, set(order)
    for i in order[:-1]:
        total += probabilities[i]
        if total <= 1 - top_p:
            survivors.remove(i)
    return survivors


@given(logits_of(), st.one_of(st.none(), st.integers(1, 12)), st.floats(0.013, 0.987))
def test_nucleus_is_the_published_rule(logits, top_k, top_p):
    top_k = None if top_k is None else min(top_k, logits.shape[-1])
    only_k = filter_logits(logits, top_k=top_k)
    both = filter_logits(logits, top_k=top_k, top_p=top_p)
    # a sum that meets the threshold to within fp32 may fall either way
    for row, found in zip(only_k, kept(both), strict=True):
        around = [nucleus_by_hand(row, top_p + error) for error in (-1e-5, 1e-5)]
        ours = set(found.nonzero()[:, 0].tolist())
        assert around[0] <= ours <= around[1]


@given(logits_of(max_rows=3), st.one_of(st.none(), st.integers(1, 12)), st.one_of(st.none(), st.floats(0.1, 1.0)))
def test_rows_are_filtered_independently(logits, top_k, top_p):
    top_k = None if top_k is None else min(top_k, logits.shape[-1])
    together = filter_logits(logits, top_k=top_k, top_p=top_p)
    alone = torch.stack([filter_logits(row, top_k=top_k, top_p=top_p) for row in logits])
    assert torch.equal(together, alone)


@given(logits_of(), st.data())
def test_draw_is_the_inverse_cdf(logits, data):
    uniforms = torch.tensor(data.draw(st.lists(st.floats(0, LARGEST_UNIFORM), min_size=1, max_size=1))).float()
    uniforms = uniforms.clamp(max=LARGEST_UNIFORM).expand(len(logits))
    found = draw_tokens(logits[None], uniforms[None])[0]
    cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)
    before = torch.cat([torch.zeros(len(logits), 1), cumulated[:, :-1]], dim=-1)
    u = uniforms.double()[:, None]
    # fp32 sums may put a number that lies on an edge to either side of it
    assert (before.gather(1, found[:, None]) <= u + 1e-6).all()
    assert (cumulated.gather(1, found[:, None]) > u - 1e-6).all()


def test_draw_by_hand():
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log()
    uniforms = torch.tensor([[0.0, 0.4999, 0.5, 0.7499, 0.75, LARGEST_UNIFORM]])
    assert draw_tokens(logits.expand(1, 6, 4), uniforms).tolist() == [[0, 0, 2, 2, 3, 3]]


@pytest.mark.parametrize("codes", [2, 100, 4096])
def test_a_filtered_code_is_never_drawn(codes):
    generator = torch.Generator().manual_seed(codes)
    logits = torch.randn(1, 200, codes, generator=generator) * 3
    # the codes at both ends are filtered, where rounding of the sum would first draw them
    keep = torch.rand(logits.shape, generator=generator) < 0.5
    keep[..., 0] = keep[..., -1] = False
    keep[..., codes // 2] = True
    filtered = logits.masked_fill(~keep, -math.inf)
    for uniform in (0.0, 0.5, 0.999, LARGEST_UNIFORM):
        drawn = draw_tokens(filtered, torch.full((1, 200), uniform))
        assert keep.gather(-1, drawn[..., None]).all()


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.1, 0.6, 0.0, 0.3])
    count = 20_000
    uniforms = torch.rand(1, count, generator=torch.Generator().manual_seed(0))
    drawn = draw_tokens(probabilities.log().expand(1, count, 4), uniforms)
    shares = torch.bincount(drawn[0], minlength=4) / count
    # five standard errors of a share
    torch.testing.assert_close(shares, probabilities, atol=5 * math.sqrt(0.25 / count), rtol=0)


def test_rows_of_a_batch_are_drawn_independently():
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(3, 5, 7, generator=generator), torch.rand(3, 5, generator=generator)
    together = draw_tokens(logits, uniforms)
    assert torch.equal(together, torch.cat([draw_tokens(logits[i : i + 1], uniforms[i : i + 1]) for i in range(3)]))


def test_guidance_identities():
    cond, uncond = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided_logits(cond, uncond, 1.0), cond)
    assert torch.equal(guided_logits(cond, uncond, 0.0), uncond)
    assert torch.equal(guided_logits(cond, cond, 4.0), cond)
    torch.testing.assert_close(guided_logits(cond, uncond, 3.0), uncond + 3 * (cond - uncond))
    # the published form, (1 + t) cond - t uncond
    torch.testing.assert_close(guided_logits(cond, uncond, 3.0), 3 * cond - 2 * uncond)


def test_smooth_weights_by_hand():
    logits = torch.tensor([[[1.0, -math.inf, 0.0]]])
    gumbels = torch.tensor([[[0.2, 9.0, -0.3]]])
    ratio = 0.5
    temperature = 0.27 * (1 - 0.95 * ratio)
    odds = math.exp((1.0 * 1.5 + 0.2 - (0.0 - 0.3)) / temperature)
    found = smooth_weights(logits, gumbels, ratio)
    torch.testing.assert_close(found, torch.tensor([[[odds / (1 + odds), 0.0, 1 / (1 + odds)]]]))
    # the temperature falls and has a floor
    assert smooth_temperature(0.0) == pytest.approx(0.27)
    assert smooth_temperature(1.0) == pytest.approx(0.0135)
    assert smooth_temperature(1.1) == 0.005


SCALES = st.floats(-5, 10)


@given(SCALES, SCALES, st.integers(2, 12), st.sampled_from(["linear", "cosine"]))
def test_ramps_go_from_start_to_end(start, end, steps, kind):
    values = GuidanceSchedule(kind, start, end).values(steps)
    assert values[0] == pytest.approx(start) and values[-1] == pytest.approx(end)
    rising = sorted(values, reverse=end < start)
    assert values == pytest.approx(rising)
    # one step alone takes the end
    assert GuidanceSchedule(kind, start, end).values(1) == pytest.approx((end,))


def test_shapes_by_hand():
    assert GuidanceSchedule("constant", 1.0, 3.0).values(3) == (3.0, 3.0, 3.0)
    assert GuidanceSchedule("linear", 1.0, 3.0).values(3) == (1.0, 2.0, 3.0)
    half = 1 + 2 * (1 - math.cos(math.pi / 4)) / 2
    assert GuidanceSchedule("cosine", 1.0, 3.0).values(5)[1] == pytest.approx(half)
    # nothing is guided after the last guided step
    assert GuidanceSchedule("constant", end=3.0, last_guided_step=1).values(4) == (3.0, 3.0, 1.0, 1.0)


def test_a_number_and_a_sequence():
    assert guidance_values(2, 3) == (2.0, 2.0, 2.0)
    assert guidance_values([1.0, 2.0], 2) == (1.0, 2.0)
    schedule = GuidanceSchedule("linear", 1.0, 2.0)
    assert guidance_values(schedule, 2) == schedule.values(2)


def test_a_schedule_survives_json():
    schedule = GuidanceSchedule("cosine", 1.0, 4.0, last_guided_step=5, first_guided_step=2)
    assert GuidanceSchedule(**json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert set(schedule.to_dict()) == {field.name for field in dataclasses.fields(schedule)}
    # records of before have no first step, and are written as they were
    from_the_first = dataclasses.replace(schedule, first_guided_step=0)
    assert GuidanceSchedule(**from_the_first.to_dict()) == from_the_first
    assert "first_guided_step" not in from_the_first.to_dict()


def test_values_that_are_no_numbers_and_sequences_of_another_length_are_refused():
    for value in (math.nan, math.inf, -math.inf):
        for call in (
            lambda value=value: guidance_values(value, 2),
            lambda value=value: guidance_values([1.0, value], 2),
            lambda value=value: GuidanceSchedule("linear", 1.0, value),
        ):
            with pytest.raises(UserError, match="finite"):
                call()
    with pytest.raises(UserError, match=r"one value per step \(3\), got 2"):
        guidance_values([1.0, 2.0], 3)
