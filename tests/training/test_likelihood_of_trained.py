"""The law of SRDD on trained models: the diffusion bound, scale by scale, is the likelihood of one pass."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from isthmus.pipelines.loading import load_pipeline
from isthmus.training.train_prior import train_prior
from tests.training.tiny_runs import prior_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_the_bound_is_the_likelihood(attention, tmp_path, images, trained_tokenizer, trained_prior):
    folder = trained_prior
    if attention == "causal":
        run = prior_run(images, tmp_path / "run", trained_tokenizer)
        train_prior(replace(run, model=replace(run.model, scale_attention="causal")))
        folder = run.out
    pipe = load_pipeline(folder, device="cpu")
    assert pipe.transformer.is_markov == (attention == "markov")
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for labels in ([0, 1, 0, 1], None):
        log_p = pipe.log_prob(pixels, labels)
        assert_close(pipe.elbo(pixels, labels), log_p, atol=1e-4, rtol=0)
    assert not torch.equal(log_p, pipe.log_prob(pixels, 0)), "training told the classes apart from none"
