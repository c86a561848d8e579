"""Next-scale pipelines on a GPU: what they return lies where it is said to, and is what the CPU makes of it."""

from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close

from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.refinement import ScaleRefinementScheduler
from tests.pipelines.tiny import tiny_pipeline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
MASK = torch.zeros(8, 8)
MASK[2:7, 3:6] = 1


@pytest.fixture(params=["markov", "causal"])
def pair(request) -> Iterator[tuple[NextScalePipeline, NextScalePipeline]]:
    """The same model on the CPU and on the GPU, where convolutions are not rounded to TF32: tokens are compared."""
    here, there = (tiny_pipeline(scale_attention=request.param) for _ in range(2))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield here, there.to("cuda")


EDITS = {
    "inpaint": lambda pipe, **form: pipe.inpaint(IMAGES, MASK, "face", jumps=1, seed=1, **form),
    "a wide picture": lambda pipe, **form: pipe.inpaint(IMAGES[..., :4, :], MASK[:4], "face", seed=1, **form),
    "outpaint": lambda pipe, **form: pipe.outpaint(IMAGES[..., :4], right=4, seed=1, **form),
    "super_resolve": lambda pipe, **form: pipe.super_resolve(IMAGES[..., :4, :4], "flag", seed=1, **form),
    "variations": lambda pipe, **form: pipe.variations(IMAGES, 1, "flag", seed=1, **form),
}


def test_edits(pair):
    for name, edit in EDITS.items():
        here, there = (edit(pipe, output_type="pt") for pipe in pair)
        assert there.images.device.type == "cuda" and all(ids.device.type == "cpu" for ids in there.token_ids)
        assert all(torch.equal(a, b) for a, b in zip(there.token_ids, here.token_ids, strict=True)), name
        assert_close(there.images.cpu(), here.images, atol=1e-3, rtol=0)
        assert edit(pair[1], output_type="latent").images.device.type == "cuda"


def test_refined_draws(pair):
    for scheduler in (
        ScaleRefinementScheduler(mode="masked", rounds=(0, 1, 1)),
        ScaleRefinementScheduler(mode="simple", rounds=(0, 1, 1), jump_scales=1),
    ):
        made = []
        for pipe in pair:
            pipe.scheduler = scheduler
            made.append(pipe([0, 1, None], guidance_scale=2.0, seed=3, output_type="pt"))
        here, there = made
        assert there.images.device.type == "cuda" and there.num_forwards == here.num_forwards
        assert all(torch.equal(a, b) for a, b in zip(there.token_ids, here.token_ids, strict=True))
        assert_close(there.images.cpu(), here.images, atol=1e-3, rtol=0)


def test_likelihood_and_classification(pair):
    here, there = pair
    for one, other in zip(there.encode(IMAGES), here.encode(IMAGES), strict=True):
        assert one.device.type == "cpu" and torch.equal(one, other)
    for labels in (["face", None], 1):
        log_p = there.log_prob(IMAGES, labels)
        assert log_p.device.type == "cpu"
        assert_close(log_p, here.log_prob(IMAGES, labels), atol=1e-2, rtol=0)
        assert_close(there.elbo(IMAGES, labels), log_p, atol=1e-2, rtol=0)
    assert_close(there.evidence(IMAGES, 1), here.evidence(IMAGES, 1), atol=1e-2, rtol=0)
    ours, theirs = (pipe.classify(IMAGES, top_k=2, num_views=2) for pipe in (there, here))
    assert torch.equal(ours.class_labels, theirs.class_labels)
    assert_close(ours.scores.nats, theirs.scores.nats, atol=1e-2, rtol=0)
    assert there.reconstruct(IMAGES, output_type="pt").device.type == "cuda"


def test_a_bfloat16_model_edits_and_reads(pair):
    pipe = pair[1].to(torch.bfloat16)
    made = pipe.inpaint(IMAGES, MASK, "face", seed=1, seam_px=0, output_type="pt").images.cpu()
    known = (MASK == 0).expand_as(IMAGES)
    assert_close(made[known], IMAGES.add(1).div(2)[known], atol=1e-6, rtol=0)
    assert torch.isfinite(pipe.log_prob(IMAGES, 0)).all()
