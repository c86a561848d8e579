import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from isthmus.nn.attention import (
    MAX_LOG_SCALE,
    KeyValueCache,
    MultiHeadAttention,
    TextKeysValues,
    causal_attention,
    markov_attention,
    scale_causal_mask,
    seeing_words,
    tanh_gelu,
    unit_heads,
)

LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=5)


def heads(tokens: int, seed: int = 0, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 3, tokens, 4, generator=generator) for _ in range(3))


def markov_mask(lengths):
    return torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()


# the last entry: long scales are cut where short ones are grouped
@given(LENGTHS)
@example([1, 4, 9, 16, 25, 36, 64, 100])
def test_attention_by_scale_is_attention_under_a_mask(lengths):
    q, k, v = heads(sum(lengths))
    for attention, mask in ((markov_attention, markov_mask), (causal_attention, scale_causal_mask)):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(lengths), scale=0.7)
        torch.testing.assert_close(attention(lengths)(q, k, v, 0.7), expected)


@pytest.mark.parametrize("attention, mask", [(markov_attention, markov_mask), (causal_attention, scale_causal_mask)])
def test_gradients_are_those_of_masked_attention(attention, mask):
    lengths = (1, 4, 9, 64, 70)
    tensors = [t.requires_grad_() for t in heads(sum(lengths), batch=1)]
    weights = heads(sum(lengths), seed=1, batch=1)[0]
    masked = F.scaled_dot_product_attention(*tensors, attn_mask=mask(lengths), scale=0.5)
    expected = torch.autograd.grad((masked * weights).sum(), tensors)
    found = torch.autograd.grad((attention(lengths)(*tensors, 0.5) * weights).sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("some", [1, 3])
def test_words_are_added_to_what_the_first_heads_see_of_tokens(some):
    tokens, (_, keys, values) = heads(14), heads(5, seed=1)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    words = keys[:, :some], values[:, :some]
    upstream = heads(14, seed=2)[0]

    def formula(q, k, v, keys, values):
        told = F.scaled_dot_product_attention(q[:, :some], keys, values, mask[:, None, None], scale=0.7)
        return markov_attention((1, 4, 9))(q, k, v, 0.7) + F.pad(told, (0, 0, 0, 0, 0, 3 - some))

    def ours(q, k, v, keys, values):
        return seeing_words(markov_attention((1, 4, 9)), TextKeysValues(keys, values, mask))(q, k, v, 0.7)

    inputs = (*tokens, *words)
    torch.testing.assert_close(ours(*inputs), formula(*inputs))
    for one in inputs:
        one.requires_grad_()
    expected, found = formula(*inputs), ours(*inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@given(LENGTHS)
def test_cached_attention_is_causal_attention(lengths):
    q, k, v = heads(sum(lengths))
    cache = KeyValueCache(1, 2, 3, sum(lengths), 4, device=torch.device("cpu"), dtype=torch.float32)
    parts = []
    for new in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True):
        parts.append(cache.attention(0)(*new, 0.7))
        cache.advance(new[0].shape[2])
    assert cache.length == sum(lengths)
    torch.testing.assert_close(torch.cat(parts, dim=2), causal_attention(lengths)(q, k, v, 0.7))


@pytest.mark.parametrize("l2_attention", [False, True])
def test_projections_by_hand(l2_attention):
    torch.manual_seed(0)
    width, num_heads = 8, 2
    attention = MultiHeadAttention(width, num_heads, l2_attention=l2_attention)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, width)
    q, k, v = F.linear(x, attention.qkv.weight).chunk(3, dim=-1)
    q, v = q + attention.q_bias, v + attention.v_bias  # keys have no bias
    mixed = torch.zeros(2, 3, width)
    for image, head in itertools.product(range(2), range(num_heads)):
        own = slice(head * 4, head * 4 + 4)
        one_q, one_k = q[image, :, own], k[image, :, own]
        if l2_attention:
            factor = attention.log_scale[0, head].clamp(max=MAX_LOG_SCALE).exp()
            scores = factor * F.normalize(one_q, dim=-1) @ F.normalize(one_k, dim=-1).T
        else:
            scores = 0.25 / math.sqrt(4) * one_q @ one_k.T
        mixed[image, :, own] = scores.softmax(dim=-1) @ v[image, :, own]
    torch.testing.assert_close(attention(x, markov_attention([3])), attention.proj(mixed))


def test_temperature_is_clamped_at_a_hundred():
    torch.manual_seed(0)
    attention = MultiHeadAttention(4, 1, l2_attention=True)
    x = torch.randn(1, 3, 4)
    outputs = []
    for log_scale in (MAX_LOG_SCALE, 9.0, 3.0):
        torch.nn.init.constant_(attention.log_scale, log_scale)
        outputs.append(attention(x, markov_attention([3])))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert math.exp(MAX_LOG_SCALE) == pytest.approx(100)


def test_unit_heads_and_their_gradients_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 5, 3, 3, 4, generator=generator, requires_grad=True)
    factor = torch.rand(1, 3, 1, 1, generator=generator).requires_grad_()
    upstream = [torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3)]
    q, k, v = (rows.transpose(1, 2) for rows in qkv.unbind(2))
    formula = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), v
    with torch.no_grad():
        torch.testing.assert_close(unit_heads(qkv, factor), formula)
    trained = unit_heads(qkv, factor)
    torch.testing.assert_close(trained, formula)
    expected, found = (torch.autograd.grad(heads, (qkv, factor), upstream) for heads in (formula, trained))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", [markov_attention, causal_attention])
def test_training_under_autocast_is_nearer_to_fp32_than_bf16_resolves(attention):
    """Scores and probabilities are fp32; only what the linear layers give and take is rounded (2^-9 each)."""
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(16, 2, l2_attention=True), torch.randn(2, 21, 16, requires_grad=True)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            mixed = layer(x, attention((1, 4, 16)))
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(mixed.float().sum(), [x, *layer.parameters()])])
        )
    assert (gradients[1] - gradients[0]).norm() < 8 * 2**-9 * gradients[0].norm()


def test_gelu_with_and_without_gradient_equals_torch():
    x = torch.linspace(-12, 12, 4001)
    torch.testing.assert_close(tanh_gelu(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    before = x.clone()
    tanh_gelu(x)
    assert torch.equal(x, before)
    x = torch.randn(50, requires_grad=True)
    assert torch.equal(tanh_gelu(x), F.gelu(x, approximate="tanh"))
