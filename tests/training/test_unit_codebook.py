"""The diffusion tokenizer's codebook: starts from what the encoder puts out, dead codes come back on latents."""

import pytest
import torch

from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.dar.train_tokenizer import codebook_weight, initialize_unit_codebook, revive_unit_codes
from isthmus.errors import UserError
from tests.testers import randomized


def tokenizer(**changes) -> DiffusionTokenizer:
    arguments = {
        "image_size": 8, "patch_size": 4, "width": 16, "num_layers": 1, "condition_width": 16,
        "num_condition_layers": 1, "head_width": 8, "num_tokens": 4, "num_groups": 2, "codebook_size": 16,
        "codebook_dim": 4, "latent_norm": True,
    }  # fmt: skip
    return randomized(DiffusionTokenizer(**arguments | changes))


def test_the_start_is_near_the_latents_and_depends_on_the_seed_alone():
    images, errors = torch.randn(32, 3, 8, 8), []
    model = tokenizer().train()
    statistics = model.latent_batch_norm.running_mean.clone()
    for seed in (None, 0, 0):
        if seed is not None:
            initialize_unit_codebook(model, images, seed=seed)
        with torch.no_grad():
            encoded = model.eval().encode(images)
        errors.append((encoded.quantized - encoded.latents).square().mean().item())
        model.train()
    assert errors[1] == errors[2] < 0.5 * errors[0]
    torch.testing.assert_close(model.codebook.weight.norm(dim=1), torch.ones(16))
    assert torch.equal(model.latent_batch_norm.running_mean, statistics)


def test_only_dead_codes_move_and_each_to_a_latent_of_its_own():
    model = tokenizer()
    latents = model.latents(torch.randn(8, 3, 8, 8)).detach()
    before, dead = model.codebook.weight.detach().clone(), torch.arange(16) % 2 == 0
    assert revive_unit_codes(model, dead, latents, seed=0, step=5) == 8
    after = model.codebook.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    hits = (after[dead].unsqueeze(1) == latents.flatten(0, 1)).all(dim=2)
    assert hits.any(dim=1).all() and len(hits.int().argmax(dim=1).unique()) == 8
    assert revive_unit_codes(model, torch.zeros(16, dtype=torch.bool), latents, seed=0, step=5) == 0


def test_continuous_tokens_have_no_codes():
    with pytest.raises(UserError, match="continuous"):
        codebook_weight(tokenizer(quantized=False))
