import copy
import math

import pytest
import torch
from torch import nn

from isthmus.errors import UserError
from isthmus.next_scale.text_block import (
    RMSNorm,
    SandwichBlock,
    SharedTextAttention,
    SizeCondition,
    SwiGLU,
    crop_values,
    scale_rotary_table,
)
from isthmus.next_scale.transformer import NextScaleBlock
from isthmus.nn.attention import FeedForward, KeyValueCache, causal_attention, markov_attention, seeing_words
from isthmus.nn.rotary import rotated
from tests.testers import NETWORK, randomized

WIDTH, HEADS, TEXT = 16, 2, 12
SIDES = (1, 2, 3)
LENGTHS = [1, 4, 9]


def sandwich(feed_forward="swiglu", *, text_width=TEXT, size_condition=True):
    hidden = SwiGLU(WIDTH, 24) if feed_forward == "swiglu" else FeedForward(WIDTH, 64)
    return SandwichBlock(WIDTH, HEADS, hidden, text_width=text_width, size_condition=size_condition)


@pytest.fixture(params=["swiglu", "gelu"])
def block(request):
    return randomized(sandwich(request.param))


@pytest.fixture
def words():
    return torch.randn(2, 5, TEXT), torch.tensor([[True] * 5, [True, True, False, False, False]])


def turned(attend, sides=SIDES):
    return rotated(attend, torch.cat([scale_rotary_table(side, WIDTH // HEADS) for side in sides]))


MARKOV = turned(markov_attention(LENGTHS))


def run(block, x, words, attend=MARKOV, start=None):
    start = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH) if start is None else start
    return block(x, block.modulate(start, start.flip(0)), attend, None, block.keys_values(*words))


def test_a_scale_alone_is_the_scale_among_others(block, words):
    x = torch.randn(2, 14, WIDTH)
    whole = run(block, x, words)
    parts = zip(SIDES, x.split(LENGTHS, dim=1), strict=True)
    alone = [run(block, part, words, turned(markov_attention([side**2]), (side,))) for side, part in parts]
    torch.testing.assert_close(torch.cat(alone, dim=1), whole, **NETWORK)


@torch.no_grad()
def test_a_cache_changes_nothing(block, words):
    x = torch.randn(2, 14, WIDTH)
    whole = run(block, x, words, turned(causal_attention(LENGTHS)))
    cache = KeyValueCache(1, 2, HEADS, 14, WIDTH // HEADS, device=x.device, dtype=x.dtype)
    for side, part, expected in zip(SIDES, x.split(LENGTHS, dim=1), whole.split(LENGTHS, dim=1), strict=True):
        behind = run(block, part, words, turned(cache.attention(0), (side,)))
        cache.advance(side**2)
        torch.testing.assert_close(behind, expected, **NETWORK)


def test_words_that_do_not_count_change_nothing(block, words):
    hidden, mask = words
    x = torch.randn(2, 14, WIDTH)
    expected = run(block, x, words)
    for other in (
        (torch.where(mask[..., None], hidden, torch.full_like(hidden, 1e3)), mask),
        (torch.nn.functional.pad(hidden, (0, 0, 0, 3)), torch.nn.functional.pad(mask, (0, 3))),
    ):
        torch.testing.assert_close(run(block, x, other), expected, **NETWORK)
    seen = block.keys_values(*words)
    one = block.keys_values(hidden[1:, :2], mask[1:, :2])
    torch.testing.assert_close(seen.rows(slice(1, 2)).keys[:, :, :2], one.keys, **NETWORK)


def test_gradients_reach_the_text_and_every_weight(block, words):
    hidden, start = words[0].requires_grad_(), torch.randn(2, WIDTH, requires_grad=True)
    run(block, torch.randn(2, 14, WIDTH), words, start=start).square().sum().backward()
    for name, tensor in [*block.named_parameters(), ("words", hidden), ("start", start)]:
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name
    assert not hidden.grad[~words[1]].any()


def test_stochastic_depth_leaves_the_gated_branches_out(block, words):
    x, start = torch.randn(2, 14, WIDTH), torch.randn(2, WIDTH)
    modulation, seen = block.modulate(start, start), block.keys_values(*words)
    dropped = block(x, modulation, MARKOV, torch.zeros(2, 2), seen)
    looked = block.cross_attention_norm_out(block.cross_attention(block.cross_attention_norm_in(x), seen))
    torch.testing.assert_close(dropped, x + looked)


def test_a_block_without_words_and_size(words):
    block = randomized(sandwich(text_width=None, size_condition=False))
    assert block.keys_values(*words) is None and not any("text" in name for name in block.state_dict())
    start = torch.randn(2, WIDTH)
    assert torch.equal(block.modulate(start, None), block.modulate(start, start))
    x = torch.randn(2, 14, WIDTH)
    assert block(x, block.modulate(start, None), markov_attention(LENGTHS)).shape == x.shape


@pytest.mark.parametrize("kind", ["weights", "autocast"])
@torch.no_grad()
def test_bf16_is_near_fp32(block, words, kind):
    x = torch.randn(2, 14, WIDTH)
    expected = run(block, x, words)
    start = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
    if kind == "weights":
        half = copy.deepcopy(block).bfloat16()
        behind = run(half, x.bfloat16(), (words[0].bfloat16(), words[1]), start=start.bfloat16())
        assert behind.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            behind = run(block, x, words, start=start)
    # 8 bits of mantissa in some ten roundings of numbers around 3
    assert (behind.float() - expected).norm() < 0.03 * expected.norm()


def test_the_weight_of_a_norm_comes_after_the_rounding():
    norm, x = RMSNorm(64), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64))
    wide = x.double()
    unit = (wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    torch.testing.assert_close(norm(x), unit.float() * norm.weight)
    torch.testing.assert_close(norm.bfloat16()(x), unit * norm.weight, rtol=0, atol=0)


def shared(unit_keys=True):
    return randomized(SharedTextAttention(3, 1, WIDTH // HEADS, TEXT, unit_keys=unit_keys))


def test_a_model_of_var_that_gets_the_look_at_a_text_starts_as_itself(words):
    block = randomized(NextScaleBlock(WIDTH, HEADS, 4.0, l2_attention=True, shared_adaln=False, norm_eps=1e-6))
    looking = shared()
    with torch.no_grad():
        looking.gate.zero_()
    arguments = torch.randn(2, 14, WIDTH), torch.randn(2, 6, WIDTH), markov_attention(LENGTHS), None
    looked = block(*arguments, looking(*words)[1])
    assert torch.equal(looked, block(*arguments))
    looked.square().sum().backward()
    assert looking.gate.grad[1].abs().min() > 0  # it can leave zero
    assert not looking.gate.grad[[0, 2]].any()  # what other blocks see


def test_a_sandwich_that_gets_the_look_at_a_text_starts_as_itself(words):
    # it has no gate: its last norm may start at zero
    seeing, blind = randomized(sandwich()), sandwich(text_width=None)
    blind.load_state_dict({name: seeing.state_dict()[name] for name in blind.state_dict()})
    with torch.no_grad():
        seeing.cross_attention_norm_out.weight.zero_()
    arguments = (torch.randn(2, 14, WIDTH), torch.randn(2, 6, WIDTH), MARKOV, None)
    assert torch.equal(seeing(*arguments, seeing.keys_values(*words)), blind(*arguments))


@pytest.mark.parametrize("unit_keys", [True, False])
def test_a_trained_gate_looks_at_the_text(words, unit_keys):
    looking = shared(unit_keys)
    q, k, v = torch.randn(3, 2, HEADS, 14, WIDTH // HEADS)
    attend = markov_attention(LENGTHS)

    def looked(hidden, mask):
        return seeing_words(attend, looking(hidden, mask)[0])(q, k, v, 1.0)

    with torch.no_grad():
        seen, blind = looked(*words), attend(q, k, v, 1.0)
        assert torch.equal(seen[:, 1:], blind[:, 1:]) and not torch.allclose(seen[:, 0], blind[:, 0])
        hidden, mask = words
        other = looked(torch.where(mask[..., None], hidden, 9.0), mask)
        torch.testing.assert_close(seen, other, **NETWORK)
        # no position: words in another order are the same words
        order = torch.tensor([3, 0, 4, 2, 1])
        torch.testing.assert_close(seen, looked(hidden[:, order], mask[:, order]), **NETWORK)
    torch.testing.assert_close(looked(*words), seen, **NETWORK)  # where gradients are wanted


def test_initial_weights_of_branches_are_scaled_down():
    for feed_forward in ("swiglu", "gelu"):
        block = sandwich(feed_forward)
        before = {name: weight.clone() for name, weight in block.state_dict().items()}
        block.scale_initial_weights(8, 1e-3, 0.5)
        factors = dict.fromkeys(before, 1.0)
        factors |= {"attention.proj.weight": 0.25, "cross_attention.proj.weight": 0.25}
        if feed_forward == "gelu":
            factors["feed_forward.down.weight"] = 0.25
        after = block.state_dict()
        modulation = before.pop("modulation.weight")
        expected = torch.cat([modulation[: 2 * WIDTH] * 1e-3, modulation[2 * WIDTH :] * 0.5])
        torch.testing.assert_close(after["modulation.weight"], expected)
        for name, weight in before.items():
            torch.testing.assert_close(after[name], weight * factors[name])


def test_a_cast_model_keeps_the_frequencies_of_sizes():
    condition = SizeCondition(WIDTH)
    kept = condition.frequency_bits.view(torch.float32).clone()
    assert kept.shape == (2,) and "frequency_bits" in condition.state_dict()
    half = copy.deepcopy(condition).bfloat16()
    assert torch.equal(half.frequency_bits.view(torch.float32), kept)
    sizes = torch.tensor([[431, 640], [768, 512]])
    near = half(sizes)
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), condition(sizes), rtol=0.02, atol=0.02)


def test_crops_by_hand():
    sizes = [[512, 512], [1024, 512], [600, 400]]
    # 600 x 400: 512 / 400 = 1.28, so 768 x 512, and (768 - 512) // 2 = 128 rows above
    assert crop_values(torch.tensor(sizes)).tolist() == [[512, 512, 0, 0], [1024, 512, 256, 0], [768, 512, 128, 0]]


def test_rotary_table_by_hand():
    # heads of 4: one pair for the column, one for the row, both turn by the coordinate itself
    table = scale_rotary_table(2, 4, extent=math.pi)
    turned = torch.tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]])
    torch.testing.assert_close(table[..., 0], turned.float())
    assert torch.equal(scale_rotary_table(1, 8), torch.tensor([1.0, 0.0]).expand(1, 4, 2))


def test_swiglu_by_hand():
    leaf = SwiGLU(1, 2)
    weights = {"gate.weight": [[1.0], [2.0]], "up.weight": [[3.0], [1.0]], "down.weight": [[1.0, 10.0]]}
    leaf.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    silu = nn.functional.silu
    x = torch.tensor([[2.0]])
    torch.testing.assert_close(leaf(x), silu(x) * 6 + silu(2 * x) * 2 * 10)


@pytest.mark.parametrize(
    ("make", "said"), [(lambda: SizeCondition(12), "multiple of 8"), (lambda: scale_rotary_table(2, 6), "of 4 wide")]
)
def test_widths_that_do_not_fit(make, said):
    with pytest.raises(UserError, match=said):
        make()
