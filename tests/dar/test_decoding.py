from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.decoding import SolverPlan, decode_tokens, flow_steps, image_noise
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from tests.testers import NETWORK

SEEDS = [(7, i) for i in range(3)]


def tiny(tokens_per_step=None, num_condition_layers=2, **decoder):
    """16 tokens in 4 groups; weights far from their start, so that every token matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = DiffusionTokenizer(
            image_size=8, patch_size=4, width=16, num_layers=1, condition_width=12, num_tokens=16, num_groups=4,
            num_condition_layers=num_condition_layers, codebook_size=32, codebook_dim=4, head_width=4, init_gate=0.5,
            tokens_per_step=tokens_per_step, table_rows=None,
        )  # fmt: skip
        pixels = FlowDecoder(
            patch_size=2, width=16, num_layers=2, condition_width=12, head_width=4, init_gate=0.5, modulation_std=0.3,
            **decoder,
        )  # fmt: skip
        with torch.no_grad():
            for model in (tokenizer, pixels):
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        token_ids = torch.randint(32, (3, 16))
    scheduler = FlowMatchingScheduler(
        num_inference_steps=4, num_groups=4, num_tokens=16, tokens_per_step=tokens_per_step
    )
    return tokenizer.eval(), pixels.eval(), scheduler, token_ids


@torch.no_grad()
def by_definition(tokenizer, decoder, scheduler, token_ids, x, plan):
    """All conditions first, then one whole network call per step."""
    condition, times = tokenizer.condition(token_ids), scheduler.times(plan.total)
    previous, states = None, []
    for index in range(plan.first, plan.total):
        start, end = plan.windows[index]
        whole = plan.needed[index]
        canvas = None if decoder.canvas is None else decoder.paint(condition[:, :whole], 0).sum(dim=1)
        velocity = decoder(x, times[index].expand(len(x)), condition[:, start:end], canvas)
        x = scheduler.step(velocity, previous, index, x, num_inference_steps=plan.total, solver=plan.solver)
        previous = velocity
        states.append(x)
    return states


def parts_of(token_ids, plan):
    for start, end in pairwise((0, *plan.stops)):
        yield token_ids[:, start:end]


OVERLAPPING = {"tokens_per_step": 8}
RAGGED = {"tokens_per_step": 6, "num_condition_layers": 0}
CANVAS = {"canvas_tokens": 16, "canvas_side": 4, "prediction": "image"}


# every number of steps, every layout of windows and every solver
@pytest.mark.parametrize(
    ("num_steps", "options", "solver"),
    [
        (1, {}, "euler"),
        (4, {}, "adams-bashforth-variable"),
        (3, OVERLAPPING, "adams-bashforth"),
        (16, RAGGED, "adams-bashforth-variable"),
        (5, CANVAS, "euler"),
    ],
)
def test_the_stream_equals_the_two_phases(num_steps, options, solver):
    tokenizer, decoder, scheduler, token_ids = tiny(**options)
    plan = SolverPlan.of(scheduler, num_inference_steps=num_steps, solver=solver)
    noise = image_noise(SEEDS, 8, 8)
    states = by_definition(tokenizer, decoder, scheduler, token_ids, noise, plan)
    steps = list(flow_steps(tokenizer, decoder, scheduler, plan, parts_of(token_ids, plan), noise))
    assert [step.index for step in steps] == list(range(num_steps)) and steps[0].total == num_steps
    for step, state in zip(steps, states, strict=True):
        assert_close(step.x, state, **NETWORK)
    assert_close(steps[-1].preview, scheduler.to_image(states[-1]), **NETWORK)
    assert_close(decode_tokens(tokenizer, decoder, scheduler, token_ids, noise, plan=plan), steps[-1].preview)


def test_a_step_runs_before_later_tokens_exist():
    for num_steps, tokens_per_step in ((4, None), (3, None), (16, None), (5, 8)):
        tokenizer, decoder, scheduler, token_ids = tiny(tokens_per_step)
        plan, drawn, shown = SolverPlan.of(scheduler, num_inference_steps=num_steps), 0, []

        def prior(token_ids=token_ids, plan=plan):
            nonlocal drawn
            for part in parts_of(token_ids, plan):
                drawn += part.shape[1]
                yield part

        for step in flow_steps(tokenizer, decoder, scheduler, plan, prior(), image_noise(SEEDS, 8, 8)):
            assert drawn == plan.windows[step.index][1]
            shown.append(step.token_ids)
        assert torch.equal(torch.cat(shown, dim=1), token_ids[:, : plan.stops[-1]])


def test_later_tokens_cannot_change_an_earlier_preview():
    tokenizer, decoder, scheduler, token_ids = tiny()
    plan, noise = SolverPlan.of(scheduler), image_noise(SEEDS, 8, 8)
    other = token_ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 32
    one, two = (
        list(flow_steps(tokenizer, decoder, scheduler, plan, parts_of(t, plan), noise)) for t in (token_ids, other)
    )
    assert torch.equal(one[1].preview, two[1].preview)
    assert not torch.equal(one[2].preview, two[2].preview)


def test_previews():
    tokenizer, decoder, scheduler, token_ids = tiny()
    noise, plan = image_noise(SEEDS, 8, 8), SolverPlan.of(scheduler)

    def steps(preview):
        parts = parts_of(token_ids, plan)
        return list(flow_steps(tokenizer, decoder, scheduler, plan, parts, noise, preview=preview))

    jumps, clipped = steps("jump"), steps("solver")
    with torch.no_grad():
        velocity = decoder(noise, torch.zeros(3), tokenizer.condition(token_ids)[:, :4])
    # the first step is one of Euler, so both previews are the jump from pure noise
    for step in (jumps[0], clipped[0]):
        assert_close(step.preview, (noise + velocity) / 0.6, **NETWORK)
    assert not torch.allclose(jumps[1].preview, clipped[1].preview)
    assert torch.equal(jumps[-1].preview, clipped[-1].preview)
    assert_close(jumps[-1].preview, jumps[-1].x / 0.6)


def test_a_restart_is_right_at_every_step():
    """A decoder whose velocity is the true one brings every restart back to the image."""
    tokenizer, decoder, scheduler, token_ids = tiny()
    image, noise = torch.rand(3, 3, 8, 8) * 2 - 1, image_noise(SEEDS, 8, 8)
    decoder.velocity = lambda x, times, keys, canvas: scheduler.velocity_target(image, noise)
    for first in range(4):
        plan = SolverPlan.of(scheduler, first=first)
        x = scheduler.add_noise(image, noise, scheduler.times()[first].expand(3))
        assert_close(decode_tokens(tokenizer, decoder, scheduler, token_ids, x, plan=plan), image, **NETWORK)


def test_a_restart_needs_earlier_tokens_for_the_causal_stack_alone():
    tokenizer, decoder, scheduler, token_ids = tiny()
    noise = image_noise(SEEDS, 8, 8)
    plan = SolverPlan.of(scheduler, first=2)
    assert plan.stops == (12, 16)
    states = by_definition(tokenizer, decoder, scheduler, token_ids, noise, plan)
    steps = list(flow_steps(tokenizer, decoder, scheduler, plan, parts_of(token_ids, plan), noise))
    assert [step.index for step in steps] == [2, 3]
    assert_close(steps[-1].x, states[-1], **NETWORK)


def test_an_image_depends_on_its_own_seed_alone():
    tokenizer, decoder, scheduler, token_ids = tiny()
    plan = SolverPlan.of(scheduler)
    assert torch.equal(image_noise(SEEDS, 8, 8)[1:2], image_noise(SEEDS[1:2], 8, 8))
    together, alone = (
        decode_tokens(tokenizer, decoder, scheduler, token_ids[rows], image_noise(SEEDS[rows], 8, 8), plan=plan)
        for rows in (slice(3), slice(1, 2))
    )
    assert_close(together[1:2], alone, **NETWORK)


def test_other_sides_and_bf16():
    tokenizer, decoder, scheduler, token_ids = tiny()
    plan = SolverPlan.of(scheduler)
    wide = decode_tokens(tokenizer, decoder, scheduler, token_ids, image_noise(SEEDS, 8, 12), plan=plan)
    assert wide.shape == (3, 3, 8, 12)
    half = decode_tokens(
        tokenizer.bfloat16(), decoder.bfloat16(), scheduler, token_ids, image_noise(SEEDS, 8, 8), plan=plan
    )
    assert half.dtype == torch.float32 and bool(torch.isfinite(half).all())


def test_what_cannot_be_decoded_is_refused_in_words():
    tokenizer, decoder, scheduler, token_ids = tiny()
    plan, noise = SolverPlan.of(scheduler), image_noise(SEEDS, 8, 8)
    with pytest.raises(UserError, match="need 16 tokens, got 12"):
        decode_tokens(tokenizer, decoder, scheduler, token_ids[:, :12], noise, plan=plan)
    with pytest.raises(UserError, match="multiples of 2"):
        decode_tokens(tokenizer, decoder, scheduler, token_ids, image_noise(SEEDS, 8, 9), plan=plan)
    with pytest.raises(UserError, match="at least 1"):
        SolverPlan.of(scheduler, num_inference_steps=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stream_on_a_gpu():
    tokenizer, decoder, scheduler, token_ids = tiny()
    plan, noise = SolverPlan.of(scheduler), image_noise(SEEDS, 8, 8)
    here = decode_tokens(tokenizer, decoder, scheduler, token_ids, noise, plan=plan)
    there = decode_tokens(tokenizer.cuda(), decoder.cuda(), scheduler, token_ids.cuda(), noise, plan=plan)
    assert_close(there.cpu(), here, atol=1e-3, rtol=1e-3)
