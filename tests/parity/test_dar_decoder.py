"""D-AR's pixel decoder and scheduler against the published ones: velocities, whole decodes, previews, training pair."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from isthmus.dar.decoding import SolverPlan, decode_tokens, flow_steps
from isthmus.dar.scheduler import time_waves
from tests.testers import assert_parity

ATOL = 1e-4


@pytest.fixture
def io(golden):
    return golden.tensors("dar/tok_a_decode.safetensors")


def steps_of(parts, token_ids, noise, preview="jump", **options):
    """The solver's steps, each as soon as its tokens have come."""
    plan = SolverPlan.of(parts[2], **options)
    tokens = (token_ids[:, start:end].long() for start, end in pairwise((0, *plan.stops)))
    return list(flow_steps(*parts, plan, tokens, noise, preview=preview))


def decode(parts, token_ids, noise, **options):
    return steps_of(parts, token_ids, noise, **options)[-1].preview


@torch.no_grad()
def test_times_and_one_velocity_with_a_time_per_image(io, published_dar):
    _, decoder, _ = published_dar("a")
    assert_parity(decoder(io["vel_x"], io["vel_t"], io["vel_cond"]), io["vel_out"], ATOL)
    assert_parity(time_waves(io["timestep_embed_t"], 128), io["timestep_embed_dim128"], ATOL)
    assert_parity(decoder.embed_times(io["timestep_embed_t"]).blocks[0], io["block0_time_embed"], ATOL)


@torch.no_grad()
def test_features_are_those_that_the_alignment_head_reads(io, golden, published_dar):
    _, decoder, _ = published_dar("a")
    weights = golden.tensors("dar/tok_a_weights.safetensors")
    velocity, features = decoder.velocity_and_features(
        io["vel_x"], decoder.embed_times(io["vel_t"]), decoder.attend_to(io["vel_cond"]), layer=1
    )
    assert_parity(velocity, io["vel_out"], ATOL)
    # the published head (spec of D-AR, 1.5.4), which is no part of the model; 16 rows of patches are pooled by 1
    h = features.flatten(2).transpose(1, 2)
    for i in (0, 2, 4):
        h = F.silu(h) if i else h
        name = f"diff_decoder.net.repa_out.{i}"
        h = F.linear(h, weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float())
    assert_parity(h, io["vel_h_repa"], ATOL)


@torch.no_grad()
def test_every_step_of_the_published_solver(io, published_dar):
    tokenizer, decoder, scheduler = published_dar("a")
    condition, times = tokenizer.condition(io["code"].long()), scheduler.times()
    assert_parity(times[:-1], io["full8_t_shifted"], 1e-6)
    previous = None
    for i, (start, end) in enumerate(scheduler.windows()):
        x, window = io["full8_x_states"][i], condition[:, start:end]
        assert_parity(window, io["full8_cond_windows"][i], ATOL)
        velocity = decoder(x, times[i].expand(len(x)), window)
        assert_parity(velocity, io["full8_velocities"][i], ATOL)
        assert_parity(scheduler.jump(x, velocity, times[i : i + 1]), io[f"derived_plain_jump_{i + 1}"], ATOL)
        following = scheduler.step(velocity, previous, i, x)
        expected = io["full8_x_states"][i + 1] if i < 7 else io["full8_image"] * scheduler.config.data_std
        assert_parity(following, expected, ATOL)
        previous = velocity


def test_decodes_of_every_number_of_steps_and_shape(io, published_dar):
    parts = published_dar("a")
    for name, options in {
        "full8": {},
        "steps5": {"num_inference_steps": 5},
        "steps16": {"num_inference_steps": 16},
        "euler8": {"solver": "euler"},
    }.items():
        assert_parity(decode(parts, io["code"], io["noise"], **options), io[f"{name}_image"], ATOL)
    assert_parity(decode(parts, io["code_rect"], io["noise_rect"]), io["rect48x32_image"], ATOL)


def test_previews_by_the_published_rule_and_by_the_jump(io, published_dar):
    clipped, jumps = (
        [step.preview for step in steps_of(published_dar("a"), io["code"], io["noise"], preview)]
        for preview in ("solver", "jump")
    )
    for k in range(8):
        assert_parity(clipped[k], io[f"preview_clip{k + 1}_image"], ATOL)
    for k in range(7):
        assert_parity(jumps[k], io[f"derived_plain_jump_{k + 1}"], ATOL)
    # with two-step solvers the last jump is no image yet: the last preview is the solver's
    assert torch.equal(jumps[-1], clipped[-1])


def test_a_restart_begins_where_it_says(golden, io, published_dar):
    """The published option skips its steps twice: asked for step 2 it restarts, otherwise rightly, at step 4."""
    scheduler = published_dar("a")[2]
    image, times = golden.tensors("dar/tok_a_encode.safetensors")["image"], scheduler.times()
    plan = SolverPlan.of(scheduler, first=4)
    torch.testing.assert_close(times[plan.first : -1], io["start2_t_shifted"])
    x = scheduler.add_noise(image, io["noise"], times[plan.first].expand(2))
    assert_parity(decode_tokens(*published_dar("a"), io["code"].long(), x, plan=plan), io["start2_image"], ATOL)


def test_decode_with_the_other_switches(golden, published_dar):
    io, parts = golden.tensors("dar/tok_b.safetensors"), published_dar("b")
    steps = steps_of(parts, io["indices"], io["noise"], "solver")
    image = steps[-1].preview
    assert_parity(image, io["full9_noresize_image"], ATOL)
    # the published setting output_resolution resizes at the end, which is left to the caller
    assert_parity(F.interpolate(image, size=(16, 16), mode="bicubic"), io["full9_image"], ATOL)
    assert_parity(steps[3].preview, io["preview_clip4_noresize_image"], ATOL)


def test_windows(golden, published_dar):
    notes = golden.json("dar/config.json")["notes"]
    scheduler = published_dar("a")[2]
    for steps, starts in notes["window_starts_32tokens_8groups"].items():
        assert scheduler.windows(int(steps)) == tuple((start, start + 4) for start in starts)
    overlapping = published_dar("b")[2]
    assert overlapping.windows() == tuple((start, start + 8) for start in notes["tok_b"]["window_starts"])
    assert overlapping.window_of(torch.arange(9) / 9).tolist() == notes["tok_b"]["window_starts"]


@torch.no_grad()
def test_training_pair(golden, published_dar):
    tokenizer, decoder, scheduler = published_dar("a")
    io = golden.tensors("dar/tok_a_train.safetensors")
    t = scheduler.shift(io["t_uniform"])
    assert_parity(t, io["t_shifted"], 1e-6)
    output = tokenizer(io["image"])
    assert torch.equal(output.token_ids, io["indices"].long())
    starts = scheduler.window_of(io["t_uniform"])
    window = torch.stack([rows[s : s + 4] for rows, s in zip(output.condition, starts, strict=True)])
    assert_parity(window, io["cond_window"], ATOL)
    x_t = scheduler.add_noise(io["image"], io["noise"], t)
    assert_parity(scheduler.to_image(x_t), io["unscaled_xt"], ATOL)
    velocity = decoder(x_t, t, window)
    assert_parity(scheduler.jump(x_t, velocity, t), io["predict_x1"], ATOL)
    error = (velocity - scheduler.velocity_target(io["image"], io["noise"])).square().mean()
    assert_parity(error / scheduler.config.data_std**2, io["fm_loss"], ATOL)
    seen = torch.arange(32) < starts[:, None] + 4
    assert_parity(output.codebook_errors[seen].mean(), io["vq_loss"], ATOL)
    assert_parity(0.25 * output.commitment_errors[seen].mean(), io["commit_loss"], ATOL)
