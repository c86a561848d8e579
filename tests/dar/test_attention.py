import cmath
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from isthmus.dar.attention import (
    RotaryCrossAttention,
    RotarySelfAttention,
    context_causal_attention,
    full_attention,
    grid_rotary_table,
    token_causal_attention,
    with_unrotated,
)
from isthmus.errors import UserError
from isthmus.nn.attention import KeyValueCache
from isthmus.nn.rotary import rotary_table, rotate
from tests.testers import randomized


def heads(tokens, width, seed=0):
    return torch.randn(2, 3, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_pairs_turn_by_hand():
    table = rotary_table(torch.tensor([0.0, 3.0]), 4, base=100.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    turned = rotate(x, table)[0, 0]
    torch.testing.assert_close(turned[0], x[0, 0, 0])  # position 0 is the identity
    # pair j turns by 3 * 100^(-2j / 4): 3 and 0.3
    pairs = [complex(1, 2) * cmath.exp(3j), complex(3, 4) * cmath.exp(0.3j)]
    expected = torch.tensor([part for z in pairs for part in (z.real, z.imag)])
    torch.testing.assert_close(turned[1], expected)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(-20, 20))
def test_scores_depend_on_distances_alone(i, j, offset):
    i, j = i + 20, j + 20
    q, k = heads(1, 8), heads(1, 8, seed=1)
    here, there = (
        (rotate(q, rotary_table(torch.tensor([float(a)]), 8)) * rotate(k, rotary_table(torch.tensor([float(b)]), 8)))
        for a, b in ((i, j), (i + offset, j + offset))
    )
    torch.testing.assert_close(here.sum(-1), there.sum(-1), atol=1e-4, rtol=1e-4)


def test_a_grid_turns_one_half_by_row_and_one_by_column():
    rows, columns, width = 3, 4, 16
    grid = grid_rotary_table(rows, columns, width).view(rows, columns, width // 2, 2)
    one_axis = rotary_table(torch.arange(4.0), width // 2)
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(grid[row, column], torch.cat([one_axis[row], one_axis[column]]))


def test_rotation_keeps_lengths_and_follows_memory_of_any_layout():
    table = grid_rotary_table(2, 3, 8)
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x.transpose(1, 2), table)  # heads as projections leave them
    torch.testing.assert_close(turned.norm(dim=-1), x.transpose(1, 2).norm(dim=-1))
    torch.testing.assert_close(turned, rotate(x.transpose(1, 2).contiguous(), table))


def test_tokens_without_a_position_stay_as_they_are():
    table = with_unrotated(grid_rotary_table(2, 2, 8), 3)
    x = heads(7, 8)
    turned = rotate(x, table)
    assert torch.equal(turned[:, :, 4:], x[:, :, 4:])
    assert torch.equal(turned[:, :, :4], rotate(x[:, :, :4], table[:4]))


def test_rotation_is_fp32_inside_and_keeps_the_type_outside():
    table, x = grid_rotary_table(32, 32, 8), heads(1024, 8).bfloat16()
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


def test_gradients_are_rotations_backwards():
    table, x = grid_rotary_table(2, 3, 8), heads(6, 8).requires_grad_()
    weights = heads(6, 8, seed=1)
    (rotate(x, table) * weights).sum().backward()
    inverse = table * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(x.grad, rotate(weights, inverse))


WIDTH, HEAD = 16, 8


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(q, k, v, rotary_q, rotary_k, layer):
    """Attention head by head from projected rows (b, l, width), as the spec of D-AR, 1.1, writes it."""
    batch, length, _ = q.shape
    mixed = torch.zeros(batch, length, WIDTH)
    for image, head in itertools.product(range(batch), range(WIDTH // HEAD)):
        own = slice(head * HEAD, (head + 1) * HEAD)
        one_q, one_k = layer.q_norm(q[image, :, own])[None, None], layer.k_norm(k[image, :, own])[None, None]
        one_q = one_q if rotary_q is None else rotate(one_q, rotary_q)
        one_k = one_k if rotary_k is None else rotate(one_k, rotary_k)
        scores = one_q[0, 0] @ one_k[0, 0].T / HEAD**0.5
        mixed[image, :, own] = scores.softmax(dim=-1) @ v[image, :, own]
    return layer.proj(mixed)


@torch.no_grad()
def test_self_attention_by_hand():
    layer, x = randomized(RotarySelfAttention(WIDTH, HEAD)), normal(2, 6, WIDTH)
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, dim=-1)
    for rotary in (None, grid_rotary_table(2, 3, HEAD)):
        torch.testing.assert_close(layer(x, rotary, full_attention), by_hand(q, k, v, rotary, rotary, layer))


@torch.no_grad()
def test_cross_attention_by_hand():
    layer = randomized(RotaryCrossAttention(WIDTH, HEAD))
    x, context, rotary = normal(2, 6, WIDTH), normal(2, 4, WIDTH, seed=1), grid_rotary_table(2, 3, HEAD)
    k, v = layer.kv(context).chunk(2, dim=-1)
    # keys have no position: their order means nothing
    expected = by_hand(layer.q(x), k, v, rotary, None, layer)
    torch.testing.assert_close(layer(x, layer.keys_values(context), rotary), expected)
    torch.testing.assert_close(layer(x, layer.keys_values(context.flip(1)), rotary), expected)


def test_gradients_reach_every_parameter():
    x, context, rotary = normal(2, 6, WIDTH), normal(2, 4, WIDTH, seed=1), grid_rotary_table(2, 3, HEAD)
    own, cross = randomized(RotarySelfAttention(WIDTH, HEAD)), randomized(RotaryCrossAttention(WIDTH, HEAD))
    own(x, rotary, full_attention).square().sum().backward()
    cross(x, cross.keys_values(context), rotary).square().sum().backward()
    for layer in (own, cross):
        # a bias of the keys' norm moves all scores of a query without a position alike, which softmax does not see
        silent = {"k_norm.bias"} if layer is cross else set()
        found = {name for name, p in layer.named_parameters() if p.grad.abs().sum() < 1e-5}
        assert found <= silent | {"k_norm.bias"}, found


@given(st.integers(0, 6), st.integers(0, 6))
def test_context_and_causal_tokens_are_attention_under_their_mask(context, later):
    length = context + later
    if not context or not length:
        return
    q, k, v = (normal(2, 2, length, HEAD, seed=seed) for seed in range(3))
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :context] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(context_causal_attention(context)(q, k, v, 0.3), expected)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_cached_groups_are_causal_attention(lengths):
    total = sum(lengths)
    q, k, v = (normal(2, 2, total, HEAD, seed=seed) for seed in range(3))
    cache = KeyValueCache(1, 2, 2, total, HEAD, device=torch.device("cpu"), dtype=torch.float32)
    parts = []
    for new in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True):
        parts.append(cache.attention(0, causal=True)(*new, 0.3))
        cache.advance(new[0].shape[2])
    torch.testing.assert_close(torch.cat(parts, dim=2), token_causal_attention(q, k, v, 0.3))


@torch.no_grad()
def test_attention_runs_under_autocast_and_in_half_precision():
    x, rotary = normal(2, 6, WIDTH), grid_rotary_table(2, 3, HEAD)
    layer = randomized(RotarySelfAttention(WIDTH, HEAD))
    expected = layer(x, rotary, full_attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (layer(x, rotary, full_attention).float() - expected).abs().max() < 0.1
    half = layer.to(torch.bfloat16)(x.bfloat16(), rotary, full_attention)
    assert half.dtype == torch.bfloat16 and (half.float() - expected).abs().max() < 0.1


def test_heads_that_do_not_fit_are_refused():
    for head_width in (0, 6, 12):
        for kind in (RotarySelfAttention, RotaryCrossAttention):
            with pytest.raises(UserError, match="multiple of head_width"):
                kind(WIDTH, head_width)
