"""Training the tokenizer: losses, straight-through gradients, and the published usage statistics of our token ids."""

import pytest
import torch

from isthmus.next_scale.conversion import build_tokenizer, convert_tokenizer_state
from isthmus.published import read_weights
from isthmus.training.codebook import code_counts
from tests.testers import assert_gradient, assert_gradient_summary, assert_parity, published_names

STORED_GRADIENTS = [
    "decoder.conv_in.bias",
    "encoder.conv_in.weight",
    "quant_conv.weight",
    "quantize.embedding.weight",
    "quantize.quant_resi.qresi_ls.1.weight",
]


@pytest.fixture(scope="module")
def trained(golden):
    """Published key -> gradient of mean((rec - image)^2) + vq loss on the first batch."""
    io = golden.tensors("var/vqvae_train_io.safetensors")
    raw = read_weights(golden.path("var/vqvae_state.safetensors"))
    converted = convert_tokenizer_state(raw, (1, 2, 3, 4))
    names = published_names(raw, converted.state)
    tokenizer = build_tokenizer(converted).train()
    images = io["step0.in.image"]
    output = tokenizer(images)
    vq_loss = output.codebook_loss + tokenizer.config.commitment_weight * output.commitment_loss
    ((output.images - images).square().mean() + vq_loss).backward()
    return {names[key]: parameter.grad for key, parameter in tokenizer.named_parameters()}


def test_reconstruction_and_vq_loss(golden, tokenizer):
    io = golden.tensors("var/vqvae_train_io.safetensors")
    for step in range(3):
        with torch.no_grad():
            output = tokenizer(io[f"step{step}.in.image"])
        assert_parity(output.images, io[f"step{step}.out.rec"])
        vq_loss = output.codebook_loss + tokenizer.config.commitment_weight * output.commitment_loss
        assert_parity(vq_loss.reshape(1), io[f"step{step}.out.vq_loss"])


def test_gradients(golden, trained):
    summaries = golden.json("var/config.json")["files"]["vqvae_train_io.safetensors"]["grad_norm_and_sum"]
    assert set(trained) == set(summaries)
    for key, (norm, total) in summaries.items():
        assert_gradient_summary(key, trained[key], norm, total)
    for key in STORED_GRADIENTS:
        assert_gradient(trained[key], golden.tensors("var/vqvae_train_io.safetensors")[f"step0.grad.{key}"])


def test_published_usage_follows_from_our_token_ids(golden, tokenizer):
    # The published statistics count scales instead of steps, so only scale 0 starts from a copy, and judge every
    # scale by the threshold of the finest. Ours (isthmus.training.codebook) do neither; the counts are the same.
    io = golden.tensors("var/vqvae_train_io.safetensors")
    num_scales, codebook_size, grid = 4, 64, 4
    average, counter = torch.zeros(num_scales, codebook_size), 0
    for step in range(3):
        images = io[f"step{step}.in.image"]
        with torch.no_grad():
            counts = code_counts(tokenizer.encode(images).token_ids, codebook_size)
        for scale in range(num_scales):
            keep = 0.0 if counter == 0 else 0.9 if counter < 100 else 0.99
            average[scale] = keep * average[scale] + (1 - keep) * counts[scale]
            counter += 1
        assert_parity(average, io[f"step{step}.out.ema_vocab_hit_SV"])
        threshold = len(images) * grid * grid / codebook_size * 0.08
        percent = (average >= threshold).float().mean(dim=1) * 100
        assert_parity(percent, io[f"step{step}.out.usages_percent"])
        assert counter == int(io[f"step{step}.out.record_hit"])
