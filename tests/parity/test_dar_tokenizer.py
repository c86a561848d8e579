"""D-AR's tokenizer against the published one: every stage of the encoder, codes, conditions, both sets of switches."""

import pytest
import torch

from isthmus.dar.attention import grid_rotary_table, rotary_table
from tests.testers import assert_parity

# the fixtures were made on another machine: their README asks for 1e-4
ATOL = 1e-4

# image -> prefix of its tensors in the file
CASES = {"a": ("a", "tok_a_encode", ""), "a-rectangle": ("a", "tok_a_encode", "rect_"), "b": ("b", "tok_b", "")}


@pytest.fixture(params=CASES)
def case(request, golden, published_dar):
    """(tokenizer, tensors of this image)."""
    variant, file, prefix = CASES[request.param]
    tensors = golden.tensors(f"dar/{file}.safetensors")
    return published_dar(variant)[0], {
        key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)
    }


def outputs_of(blocks, call):
    """What `call` returns, and what every block returned on the way."""
    seen = []
    hooks = [block.register_forward_hook(lambda *args: seen.append(args[-1])) for block in blocks]
    returned = call()
    for hook in hooks:
        hook.remove()
    return returned, seen


@torch.no_grad()
def test_encoder_codes_and_conditions(case):
    tokenizer, io = case
    assert_parity(tokenizer.patch_embedding(io["image"]), io["patch_embed"], ATOL)
    captured = []
    hook = tokenizer.to_code.register_forward_hook(lambda _, args, out: captured.extend([args[0], out]))
    latents, seen = outputs_of(tokenizer.encoder, lambda: tokenizer.latents(io["image"]))
    hook.remove()
    for i, x in enumerate(seen):
        assert_parity(x, io[f"encoder_layer_{i}"], ATOL)
    assert_parity(captured[0], io["encoder_features"], ATOL)
    assert_parity(captured[1], io["z_pre_l2"], ATOL)
    assert_parity(latents.norm(dim=-1), torch.ones(latents.shape[:2]))
    encoded = tokenizer.encode(io["image"])
    assert torch.equal(encoded.token_ids, io["indices"].long())
    assert_parity(encoded.quantized, io["quant_ste"], ATOL)
    token_ids = io["indices"].long()
    condition, seen = outputs_of(tokenizer.condition_layers, lambda: tokenizer.condition(token_ids))
    for i, x in enumerate(seen):
        assert_parity(x, io[f"decoder_layer_{i}"], ATOL)
    assert_parity(condition, io["cond_from_code"], ATOL)
    assert_parity(tokenizer(io["image"]).condition, io["cond"], ATOL)


def test_rotary_tables(golden):
    published = golden.tensors("dar/tok_a_encode.safetensors")["rope2d_4x6_theta10000"][0, 0]
    cos, sin = grid_rotary_table(4, 6, 64).unbind(-1)
    rotations = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], dim=-2)
    # angles of up to 32 rad are rounded by 32 u = 2e-6, and so are their waves
    assert_parity(rotations, published, 4e-6)
    sequence = golden.tensors("dar/gpt.safetensors")["freqs_cis"]
    assert_parity(rotary_table(torch.arange(33.0), 16), sequence, 4e-6)
