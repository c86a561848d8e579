import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from isthmus.errors import UserError
from isthmus.next_scale.transformer import (
    BlockModulation,
    NextScaleTransformer,
    SharedModulationOffset,
    modulated_norm,
    sampling_flops,
)
from isthmus.nn.attention import FeedForward
from isthmus.text.encoders import TextFeatures
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


TEXTS = {
    "switti": {
        "num_classes": 0, "scale_attention": "markov", "l2_attention": False, "norm": "rms_sandwich",
        "position": "rope2d", "rope_extent": 16.0, "feed_forward": "swiglu", "mlp_ratio": 8 / 3, "size_condition": True,
        "text_width": 12, "text_pooled_width": 6,
    },
    "switti-causal-without-words": {
        "num_classes": 0, "l2_attention": False, "norm": "rms_sandwich", "text_pooled_width": 6, "num_layers": 1,
    },
    "var-with-text": {"text_width": 12, "text_pooled_width": 6, "position": "rope2d"},
}  # fmt: skip


def text_for(batch: int, words: int = 5) -> TextFeatures:
    """Prompts of 2, 3, 4 ... words; what stands in the place of others must not matter."""
    generator = torch.Generator().manual_seed(3)
    hidden, pooled = (torch.randn(batch, n, generator=generator) for n in (words * 12, 6))
    mask = torch.arange(words) < 2 + torch.arange(batch)[:, None] % (words - 1)
    return TextFeatures(hidden.view(batch, words, 12), mask, pooled)


class TestNextScaleTransformerOfTexts(PriorLaws):
    @pytest.fixture(params=list(TEXTS))
    def model(self, request):
        return build(**TEXTS[request.param])

    @pytest.fixture
    def inputs(self, model):
        return *arguments_for(model, batch=4), text_for(4)

    def test_keep_factors_act_per_image_and_layer(self, model, inputs):
        keep = torch.ones(4, model.config.num_layers, 2)
        keep[0] = 0
        dropped, plain = model(*inputs, keep=keep).logits, model(*inputs).logits
        torch.testing.assert_close(dropped[1:], plain[1:])
        assert (dropped[0] - plain[0]).abs().max() > 1e-3


def test_padding_of_texts_changes_nothing():
    for name in TEXTS:
        model, text = build(**TEXTS[name]), text_for(3)
        labels, scale_inputs = arguments_for(model)
        expected = model(labels, scale_inputs, text).logits
        other = text.padded(9)
        other.hidden[~other.mask] = 1e3
        torch.testing.assert_close(model(labels, scale_inputs, other).logits, expected, **NETWORK)


def test_gradients_reach_the_text():
    model, text = build(**TEXTS["switti"]), text_for(3)
    for part in (text.hidden, text.pooled):
        part.requires_grad_()
    model(*arguments_for(model), text).logits.square().sum().backward()
    seen = text.hidden.grad.abs().sum(dim=-1) > 0
    assert torch.equal(seen, text.mask) and (text.pooled.grad.abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("scale_attention", ["causal", "markov"])
def test_a_class_model_that_gets_the_text_branch_is_the_one_it_was(scale_attention):
    plain = build(scale_attention=scale_attention)
    told = NextScaleTransformer(**ARGUMENTS, scale_attention=scale_attention, text_width=12, text_pooled_width=6).eval()
    missing, unexpected = told.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {name for name in told.state_dict() if "text" in name} == set(missing)
    labels, scale_inputs = arguments_for(plain)
    logits = told(labels, scale_inputs, text_for(3)).logits
    assert torch.equal(logits, plain(labels, scale_inputs).logits)
    logits.square().sum().backward()
    assert told.text_start.weight.grad.any() and told.shared_text.gate.grad.any()


def test_image_sizes_are_a_condition_of_their_own():
    model, text = build(**TEXTS["switti"]), text_for(3)
    labels, scale_inputs = arguments_for(model)
    square, plain, wide = (
        model(labels, scale_inputs, text, image_sizes=sizes).logits
        for sizes in (torch.full((3, 2), 512), None, torch.tensor([[512, 512], [300, 900], [512, 512]]))
    )
    assert torch.equal(square, plain) and torch.equal(wide[[0, 2]], plain[[0, 2]])
    assert (wide[1] - plain[1]).abs().max() > 1e-3
    # the angles reach thousands: as numbers of bf16 they would be noise
    half = copy.deepcopy(model).bfloat16().size_condition
    sizes = torch.tensor([[300, 900]])
    expected = model.size_condition(sizes)
    assert (half(sizes).float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_later_arguments_leave_no_trace_in_a_class_model(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not set(NextScaleTransformer.later_arguments) & set(stored) and "has_mask_embedding" in stored
    assert NextScaleTransformer.from_pretrained(tmp_path).config.keys() == model.config.keys()
    build(**TEXTS["switti"]).save_pretrained(tmp_path / "text")
    stored = json.loads((tmp_path / "text" / "config.json").read_text())
    assert {"norm", "position", "rope_extent", "text_width"} <= set(stored) and "rope_base" not in stored


def test_designs_that_no_block_has_are_refused():
    switti = TEXTS["switti"]
    for arguments, said in [
        ({"feed_forward": "swiglu"}, "has feed_forward gelu"),
        ({"size_condition": True}, "no size_condition"),
        (switti | {"l2_attention": True}, "no l2_attention"),
        (switti | {"shared_adaln": True}, "no shared_adaln"),
        (switti | {"norm_eps": 1e-5}, "norm_eps 1e-6"),
        (switti | {"text_pooled_width": None}, "text_pooled_width too"),
        (switti | {"width": 12}, "multiple of 4 wide"),
        (switti | {"rope_extent": 0.0}, "rope_extent must be positive"),
        ({"rope_extent": 16.0}, "rope_extent belongs to position rope2d"),
    ]:
        with pytest.raises(UserError, match=said):
            build(**arguments)
    plain, told = build(), build(**switti)
    labels, text = torch.zeros(2, dtype=torch.long), text_for(2)
    narrow = TextFeatures(text.hidden[..., :5], text.mask, text.pooled)
    sizes = torch.full((2, 2), 512)
    for model, arguments, said in [
        (plain, (labels, text), "knows classes alone"),
        (plain, (labels, None, sizes), "no size condition"),
        (told, (labels,), "draws from texts, got none"),
        (told, (labels, text_for(3)), "a text for every label, got 3 for 2"),
        (told, (labels, narrow), "text_width 12, got 5"),
    ]:
        with pytest.raises(UserError, match=said):
            model.condition(*arguments)


def test_operations_of_a_draw_are_those_that_are_counted():
    for name, changes in [("var", {}), *TEXTS.items()]:
        model = build(**changes | {"scale_attention": "markov"})
        labels, scale_inputs = arguments_for(model, batch=1)
        text = () if name == "var" else (text_for(1),)
        # the products of attention are counted where they are made one by one
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(labels, scale_inputs, *text)
        # one pass over all scales, each alone, as a draw makes them; the first reads no code, which is not told apart
        unread = 2 * model.schedule.lengths[0] * model.config.codebook_dim * model.config.width
        assert counter.get_total_flops() + unread == sampling_flops(model.config, num_words=5), name


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


def test_bf16_stays_near_fp32():
    for name, changes in [("causal", {}), ("markov", {"scale_attention": "markov"}), *TEXTS.items()]:
        model = build(**changes)
        labels, scale_inputs = arguments_for(model)
        text = (text_for(3),) if name in TEXTS else ()
        reference = model(labels, scale_inputs, *text).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(labels, scale_inputs, *text).logits
        half = copy.deepcopy(model).bfloat16()
        cast = half(labels, scale_inputs.bfloat16(), *text).logits
        for logits in (mixed, cast):
            assert (logits.float() - reference).abs().mean() < 0.05 * reference.abs().mean(), name


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
