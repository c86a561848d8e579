import math

import pytest
import torch
import torch.nn.functional as F

from isthmus.errors import UserError
from isthmus.next_scale.transformer import BlockModulation, NextScaleTransformer, SharedModulationOffset, modulated_norm
from isthmus.nn.attention import FeedForward
from tests.testers import NETWORK, PriorLaws, needs_compiler, randomized, run_compiled


def test_modulated_norm_is_norm_then_scale_and_shift():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    zero, one = torch.zeros(2, 1, 8), torch.ones(2, 1, 8)
    plain = modulated_norm(x, zero, zero, 1e-6)
    torch.testing.assert_close(plain.mean(dim=-1), torch.zeros(2, 5))
    torch.testing.assert_close(plain.square().mean(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(modulated_norm(x, 2 * one, -one, 1e-6), 3 * plain - 1)


def test_block_modulation_gives_six_chunks_in_order():
    modulation = BlockModulation(4)
    activated = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    chunks = modulation.linear(activated).chunk(6, dim=-1)
    assert torch.equal(modulation(activated), torch.stack(chunks, dim=1))


def test_shared_modulation_adds_an_offset_per_block():
    modulation = SharedModulationOffset(4)
    shared = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(modulation(shared) - shared, modulation.offset.expand(3, 6, 4))


def test_feed_forward_is_two_layers_around_the_tanh_gelu():
    layer = FeedForward(4, 6)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    h = layer.up(x)
    gelu = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(layer(x), layer.down(gelu))
    assert not torch.equal(gelu, F.gelu(h))


def test_images_of_many_tokens_are_normed_one_by_one_and_have_the_gradients_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 65, 64, generator=generator, requires_grad=True)
    scale, shift = (torch.randn(3, 1, 64, generator=generator, requires_grad=True) for _ in range(2))
    upstream = torch.randn(3, 65, 64, generator=generator)
    formula = F.layer_norm(x, (64,), eps=1e-6) * (1 + scale) + shift
    trained = modulated_norm(x, scale, shift, 1e-6)
    torch.testing.assert_close(trained, formula)
    expected, found = (torch.autograd.grad(y, (x, scale, shift), upstream) for y in (formula, trained))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # sums over 65 tokens of numbers around 1


ARGUMENTS = {
    "scale_sizes": (1, 2, 3),
    "codebook_size": 10,
    "codebook_dim": 4,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_classes": 3,
}


def build(**changes) -> NextScaleTransformer:
    return randomized(NextScaleTransformer(**ARGUMENTS | changes))


def arguments_for(model, batch: int = 3):
    generator = torch.Generator().manual_seed(2)
    tokens = model.schedule.num_tokens - model.schedule.lengths[0]
    inputs = torch.randn(batch, tokens, model.config.codebook_dim, generator=generator)
    return torch.arange(batch) % (model.null_class_id + 1), inputs


class TestNextScaleTransformer(PriorLaws):
    @pytest.fixture(
        params=[
            # every pair of mask, modulation and attention
            {"shared_adaln": True},
            {"shared_adaln": True, "scale_attention": "markov", "l2_attention": False},
            # starts above 1 x 1, and is long enough for scales that are attended to one by one
            {"scale_sizes": (2, 5, 7), "num_layers": 1, "l2_attention": False},
            {"scale_attention": "markov"},
            {"scale_sizes": (3,), "num_layers": 1},
        ],
        ids=["causal", "markov-dot", "long-causal-dot", "markov", "one-scale"],
    )
    def model(self, request):
        return build(**request.param)

    @pytest.fixture
    def inputs(self, model):
        # the last of three labels is the null label, and no class but the three is looked up
        return arguments_for(model, batch=4)

    def test_gradients_reach_every_parameter(self, model, inputs):
        model.zero_grad()
        self.loss(model(*inputs)).backward()
        silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        # with one scale the model reads no features, so nothing is embedded
        alone = {"word_embedding.weight", "word_embedding.bias"} if model.schedule.num_scales == 1 else set()
        assert silent == alone


def test_any_scales_of_a_markov_model_are_rows_of_the_full_pass():
    model = build(scale_attention="markov")
    labels, scale_inputs = arguments_for(model)
    full = model(labels, scale_inputs).logits.split([1, 4, 9], dim=1)
    parts = scale_inputs.split([0, 4, 9], dim=1)
    for scales in ((0,), (1,), (0, 2), (1, 2)):
        logits = model(labels, torch.cat([parts[k] for k in scales], dim=1), scales=scales).logits
        torch.testing.assert_close(logits, torch.cat([full[k] for k in scales], dim=1), **NETWORK)


def test_markov_and_causal_differ_only_in_what_they_see():
    causal, markov = build(), build(scale_attention="markov")
    markov.load_state_dict(causal.state_dict())
    labels, scale_inputs = arguments_for(causal)
    a, b = causal(labels, scale_inputs).logits, markov(labels, scale_inputs).logits
    torch.testing.assert_close(a[:, :1], b[:, :1])
    assert (a[:, 1:] - b[:, 1:]).abs().max() > 1e-3


def test_cache_of_leading_rows():
    # guidance may end before the last scale: the null rows behind the others are then left out
    model = build()
    labels, scale_inputs = arguments_for(model, batch=4)
    expected = model(labels, scale_inputs).logits[:2, 5:]
    conditioning, cache = model.condition(labels), model.new_cache(4)
    parts = scale_inputs.split([0, 4, 9], dim=1)
    for scale in (0, 1):
        model.forward_scale(scale, parts[scale], conditioning, cache)
    logits = model.forward_scale(2, parts[2][:2], conditioning.rows(slice(2)), cache)
    torch.testing.assert_close(logits, expected, **NETWORK)


def test_truncated_cache_repeats_a_scale():
    model = build()
    labels, scale_inputs = arguments_for(model)
    conditioning, cache = model.condition(labels), model.new_cache(3)
    parts = scale_inputs.split([0, 4, 9], dim=1)
    model.forward_scale(0, parts[0], conditioning, cache)
    first = model.forward_scale(1, parts[1], conditioning, cache)
    cache.truncate(1)
    model.forward_scale(1, parts[1] + 1, conditioning, cache)
    cache.truncate(1)
    torch.testing.assert_close(model.forward_scale(1, parts[1], conditioning, cache), first)
    assert cache.length == 5


def test_two_requests_can_interleave():
    model = build()
    labels, scale_inputs = arguments_for(model, batch=2)
    parts = scale_inputs.split([0, 4, 9], dim=1)
    requests = [(model.condition(labels[i : i + 1]), model.new_cache(1), []) for i in range(2)]
    for scale in range(3):
        for i, (conditioning, cache, logits) in enumerate(requests):
            logits.append(model.forward_scale(scale, parts[scale][i : i + 1], conditioning, cache))
    together = torch.cat([torch.cat(logits, dim=1) for *_, logits in requests])
    torch.testing.assert_close(together, model(labels, scale_inputs).logits, **NETWORK)


def test_bf16_autocast_stays_near_fp32():
    for scale_attention in ("causal", "markov"):
        model = build(scale_attention=scale_attention)
        labels, scale_inputs = arguments_for(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(labels, scale_inputs).logits
        reference = model(labels, scale_inputs).logits
        assert (logits.float() - reference).abs().mean() < 0.05 * reference.abs().mean()


@pytest.mark.parametrize("shared_adaln", [False, True])
def test_initial_weights(shared_adaln):
    """Spec of the published networks: std sqrt(1 / (3 width)), and what is scaled down from there."""
    width, depth, gate, modulation = 128, 3, 1e-3, 0.5
    model = NextScaleTransformer(
        **ARGUMENTS | {"width": width, "num_layers": depth, "codebook_dim": 32, "codebook_size": 64},
        shared_adaln=shared_adaln,
        init_gate=gate,
        init_modulation=modulation,
    )
    std = math.sqrt(1 / (3 * width))
    block, residual = model.blocks[1], math.sqrt(2 * depth)
    expected = {
        model.word_embedding.weight: std,
        model.position: std,
        model.head.weight: 0.02 * std,
        model.head_modulation.weight: modulation * std,
        block.attention.qkv.weight: std,
        block.attention.proj.weight: std / residual,
        block.feed_forward.up.weight: std,
        block.feed_forward.down.weight: std / residual,
    }
    if shared_adaln:
        expected[model.shared_modulation.linear.weight] = std
        expected[block.modulation.offset[:, :2]] = gate / math.sqrt(width)
        expected[block.modulation.offset[:, 2:]] = modulation / math.sqrt(width)
    else:
        expected[block.modulation.linear.weight[: 2 * width]] = gate * std
        expected[block.modulation.linear.weight[2 * width :]] = modulation * std
    for tensor, deviation in expected.items():
        # the standard error of a standard deviation is std / sqrt(2 n); five of them
        assert float(tensor.detach().std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * tensor.numel()))
    assert torch.equal(block.attention.log_scale, torch.full((1, 2, 1, 1), math.log(4)))
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_stochastic_depth_rises_linearly():
    assert build(num_layers=3, drop_path=0.2).drop_path_rates == pytest.approx((0.0, 0.1, 0.2))
    assert build(num_layers=1, drop_path=0.2).drop_path_rates == (0.0,)


def test_bad_inputs_are_named():
    with pytest.raises(UserError, match="multiple of num_heads"):
        build(num_heads=3)
    causal, markov = build(), build(scale_attention="markov")
    labels, scale_inputs = arguments_for(causal)
    for scales in ((), (1, 0), (1, 1), (3,), (-1, 0)):
        with pytest.raises(UserError, match="increasing order"):
            markov(labels, scale_inputs, scales=scales)
    with pytest.raises(UserError, match="must hold 13 tokens"):
        causal(labels, scale_inputs[:, 1:])
    with pytest.raises(UserError, match="every earlier scale"):
        causal(labels, scale_inputs[:, 4:], scales=(2,))
    with pytest.raises(UserError, match="needs a cache"):
        causal.forward_scale(0, scale_inputs[:, :0], causal.condition(labels))
    with pytest.raises(UserError, match="takes none"):
        markov.forward_scale(0, scale_inputs[:, :0], markov.condition(labels), causal.new_cache(3))
    assert markov.new_cache(3) is None


COMPILED = """
import torch
from isthmus.next_scale.transformer import NextScaleTransformer
from tests.testers import randomized

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
labels, inputs = torch.tensor([0, 2]), torch.randn(2, 4, 4, generator=generator)
results = []
for compiled in (False, True):
    # two blocks: one compiled block serves both
    model = randomized(NextScaleTransformer(
        scale_sizes=(1, 2), codebook_size=10, codebook_dim=4, width=16, num_layers=2, num_heads=2, num_classes=3,
        scale_attention="markov"))
    if compiled:
        model.compile_blocks()
    with torch.no_grad():
        drawn = model.forward_scale(1, inputs, model.condition(labels))
    model.train()(labels, inputs).logits.square().mean().backward()
    results.append((drawn, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
for plain, compiled in zip(*results, strict=True):
    torch.testing.assert_close(compiled, plain, atol=5e-5, rtol=1e-4)
"""


@pytest.mark.slow
@needs_compiler
def test_compiled_blocks_draw_and_learn_the_same(tmp_path):
    run_compiled(COMPILED, tmp_path)
