"""The whole published way at small size, through converter and pipeline: tokens, pixels, previews, restarts."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from isthmus.dar.conversion import convert_dar
from isthmus.dar.decoding import SolverPlan, decode_tokens, flow_steps
from isthmus.dar.sampling import generate_tokens
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions
from tests.parity.published_dar_files import write_published_files
from tests.testers import assert_parity

ATOL = 1e-4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    tokenizer, prior = write_published_files(golden, tmp_path_factory.mktemp("published"))
    return convert_dar(tokenizer, prior, num_heads=4)


@pytest.fixture(scope="module")
def pipe(converted, tmp_path_factory):
    """The converted pipeline, saved and loaded again."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    converted.pipeline.save_pretrained(folder)
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def io(golden):
    return golden.tensors("dar/tok_a_decode.safetensors")


def steps_of(pipe, token_ids, noise, *, preview="jump", **options):
    plan = SolverPlan.of(pipe.scheduler, **options)
    parts = (token_ids[:, a:b].long() for a, b in pairwise((0, *plan.stops)))
    return list(flow_steps(pipe.image_tokenizer, pipe.decoder, pipe.scheduler, plan, parts, noise, preview=preview))


def test_what_is_dropped_is_said(converted, pipe):
    dropped = converted.dropped_tokenizer_keys
    assert dropped and all("repa_out" in key or "codebook_used" in key for key in dropped)
    assert all("alignment head" in why for key, why in dropped.items() if "repa_out" in key)
    assert converted.dropped_prior_keys == {}
    assert pipe.defaults == SamplingOptions(guidance_scale=GuidanceSchedule("linear", 1.2, 8.0))
    assert (pipe.num_classes, pipe.image_size) == (10, 32)
    assert (pipe.scheduler.config["num_inference_steps"], pipe.scheduler.config["data_std"]) == (8, 0.6)


def test_tokens_drive_pixels_while_they_are_drawn(golden, pipe):
    gpt = golden.tensors("dar/gpt.safetensors")
    plan, options = SolverPlan.of(pipe.scheduler), SamplingOptions(guidance_scale=4.0, top_k=1)
    seeds = [(0, i) for i in range(4)]
    drawn = generate_tokens(pipe.transformer, pipe.token_layout, gpt["labels"], seeds, options, stops=plan.stops)
    steps = list(flow_steps(pipe.image_tokenizer, pipe.decoder, pipe.scheduler, plan, drawn, gpt["e2e_noise"]))
    assert torch.equal(torch.cat([s.token_ids for s in steps], dim=1), gpt["gen_cfg4_tokens"].long())
    assert_parity(steps[-1].preview, gpt["e2e_image"], ATOL)


def test_greedy_calls_give_the_published_tokens(golden, pipe):
    gpt = golden.tensors("dar/gpt.safetensors")
    labels = gpt["labels"].tolist()
    drawn = pipe(labels, guidance_scale=4.0, top_k=1, seed=0)
    assert torch.equal(drawn.token_ids, gpt["gen_cfg4_tokens"].long())
    shared = gpt["gen_sharedprefix8_cfg4_tokens"].long()
    kept = pipe(labels, guidance_scale=4.0, top_k=1, seed=0, prefix_token_ids=shared[0], prefix_tokens=8)
    assert torch.equal(kept.token_ids, shared)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("full8", {}),
        ("steps5", {"num_inference_steps": 5}),
        ("steps16", {"num_inference_steps": 16}),
        ("euler8", {"solver": "euler"}),
    ],
)
def test_the_stream_equals_the_published_two_phases(io, pipe, name, options):
    steps = steps_of(pipe, io["code"], io["noise"], **options)
    assert_parity(steps[-1].preview, io[f"{name}_image"], ATOL)


def test_previews_by_the_published_rule_and_by_the_jump(io, pipe):
    clipped = steps_of(pipe, io["code"], io["noise"], preview="solver")
    jumps = steps_of(pipe, io["code"], io["noise"])
    for k in range(1, 9):
        assert_parity(clipped[k - 1].preview, io[f"preview_clip{k}_image"], ATOL)
    for k in range(1, 8):
        assert_parity(jumps[k - 1].preview, io[f"derived_plain_jump_{k}"], ATOL)
    # with two-step solvers the last jump is no image yet: the last preview is the solver's
    assert torch.equal(jumps[-1].preview, clipped[-1].preview)


def test_rectangular_images(io, pipe):
    assert_parity(steps_of(pipe, io["code_rect"], io["noise_rect"])[-1].preview, io["rect48x32_image"], ATOL)


def test_a_restart_begins_where_it_says(golden, io, pipe):
    """The published option skips its steps twice: asked for step 2 it restarts, otherwise rightly, at step 4."""
    image = golden.tensors("dar/tok_a_encode.safetensors")["image"]
    plan, times = SolverPlan.of(pipe.scheduler, first=4), pipe.scheduler.times()
    assert_close(times[plan.first : -1], io["start2_t_shifted"])
    x = pipe.scheduler.add_noise(image, io["noise"], times[plan.first].expand(2))
    restarted = decode_tokens(pipe.image_tokenizer, pipe.decoder, pipe.scheduler, io["code"].long(), x, plan=plan)
    assert_parity(restarted, io["start2_image"], ATOL)


def test_the_other_switches_stream_too(golden, published_dar):
    """Windows that overlap, no causal stack, one time embedding, an adaptive head."""
    io = golden.tensors("dar/tok_b.safetensors")
    tokenizer, decoder, scheduler = published_dar("b")
    plan = SolverPlan.of(scheduler)
    image = decode_tokens(tokenizer, decoder, scheduler, io["indices"].long(), io["noise"], plan=plan)
    assert_parity(image, io["full9_noresize_image"], ATOL)
