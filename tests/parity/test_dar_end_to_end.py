"""The whole published way at small size, through converter and pipeline: tokens, and pixels while they are drawn."""

import pytest
import torch

from isthmus.dar.conversion import convert_dar
from isthmus.dar.decoding import SolverPlan, flow_steps
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
