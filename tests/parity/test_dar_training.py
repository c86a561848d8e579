"""Training the D-AR tokenizer: times, jump, losses and gradients of one published step, alignment head included."""

import copy

import pytest
import torch

from isthmus.dar.runs import DiffusionTokenizerLoss
from isthmus.dar.tokenizer_losses import diffusion_losses
from isthmus.dar.train_tokenizer import AlignmentHead, TokenizerWithDecoder
from isthmus.published import read_weights
from tests.testers import assert_gradient, assert_parity

# the fixtures were made on another machine: their README asks for 1e-4
ATOL = 1e-4

# published key -> ours; keys and queries of ours are rows of one matrix
GRADIENTS = {
    "decoder_layers.0.gate1": "image_tokenizer.condition_layers.0.gate1",
    "diff_decoder.net.blocks.1.adaLN_modulation.1.bias": "decoder.blocks.1.modulation.bias",
    "diff_decoder.net.conv_in.weight": "decoder.patch_embedding.weight",
    "diff_decoder.net.conv_out.bias": "decoder.head.bias",
    "encoder_layers.1.attention.q_norm.weight": "image_tokenizer.encoder.1.attention.q_norm.weight",
    "patchify.weight": "image_tokenizer.patch_embedding.weight",
    "quant_in_conv.weight": "image_tokenizer.to_code.weight",
    "quant_out_conv.weight": "image_tokenizer.from_code.weight",
    "quantize.embedding.weight": "image_tokenizer.codebook.weight",
    "query_embedding.weight": "image_tokenizer.query_table",
}


@pytest.fixture(scope="module")
def io(golden):
    return golden.tensors("dar/tok_a_train.safetensors")


@pytest.fixture(scope="module")
def step(golden, io, published_dar):
    """(network, output, losses) of one step; gradients are in the network."""
    tokenizer, decoder, scheduler = published_dar("a")
    head = AlignmentHead(128, 8, 16, hidden_width=16)
    raw = read_weights(golden.path("dar/tok_a_weights.safetensors"))
    prefix = "diff_decoder.net.repa_out."
    head.layers.load_state_dict({k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)})
    network = TokenizerWithDecoder(
        copy.deepcopy(tokenizer), copy.deepcopy(decoder), scheduler, alignment=head, alignment_layer=1
    )
    output = network.train()(io["image"], io["t_uniform"].unsqueeze(1), io["noise"].unsqueeze(1))
    losses = diffusion_losses(output, io["image"], DiffusionTokenizerLoss(), data_std=scheduler.config["data_std"])
    sum(value for name, value in losses.items() if name.startswith("weighted/")).backward()
    return network, output, losses


def test_times_windows_jump_and_aligned_features(io, step):
    network, output, _ = step
    assert_parity(network.scheduler.shift(io["t_uniform"]), io["t_shifted"], ATOL)
    starts = output.ends.flatten() - network.scheduler.tokens_per_step
    condition = network.image_tokenizer.condition(io["indices"].long())
    rows = [condition[i, start : start + 4] for i, start in enumerate(starts)]
    assert_parity(torch.stack(rows), io["cond_window"], ATOL)
    assert torch.equal(output.encoded.token_ids, io["indices"].long())
    assert_parity(output.jump, io["predict_x1"], ATOL)
    assert_parity(output.aligned.flatten(2).transpose(1, 2), io["h_repa"], ATOL)


def test_losses(io, step):
    _, _, losses = step
    assert_parity(losses["flow"], io["fm_loss"], ATOL)
    assert_parity(losses["codebook"], io["vq_loss"], ATOL)
    # the published term is weighted
    assert_parity(losses["weighted/commitment"], io["commit_loss"], ATOL)
    total = losses["weighted/flow"] + losses["weighted/codebook"] + losses["weighted/commitment"]
    assert_parity(total, io["total_vq_commit_fm"], ATOL)


def test_gradients(io, step):
    parameters = dict(step[0].named_parameters())
    for published, ours in GRADIENTS.items():
        gradient, expected = parameters[ours].grad, io[f"grad:{published}"]
        # unused rows of the query table get none; 1 x 1 convolutions are matrices here, patches of 8 x 8 are not
        if published == "query_embedding.weight":
            assert not gradient[len(expected) :].any()
            gradient = gradient[: len(expected)]
        elif expected.shape[2:] == (1, 1):
            expected = expected[:, :, 0, 0]
        assert_gradient(gradient, expected)
    # queries have a matrix of their own; keys come before values
    bias = step[0].decoder.blocks[0].cross_attention.kv.bias.grad
    assert_gradient(bias[:128], io["grad:diff_decoder.net.blocks.0.cross_attn.k.bias"])
