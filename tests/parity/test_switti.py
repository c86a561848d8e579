"""Switti against the published networks: logits and blocks, gradients, tables, whole generations, both masks."""

import pytest
import torch
import torch.nn.functional as F

from isthmus.next_scale.conversion import build_prior, convert_switti_state
from isthmus.next_scale.sampling import AskedTexts, ScaleSampler
from isthmus.next_scale.text_block import TextCrossAttention, crop_values, fourier_features, scale_rotary_table
from isthmus.nn.attention import markov_attention
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.nn.rotary import rotated
from isthmus.pipelines.options import SamplingOptions, SmoothSchedule
from isthmus.text.encoders import TextFeatures
from tests.testers import assert_gradient, assert_gradient_summary, assert_parity, published_names

ATOL = 2e-5
LENGTHS = [1, 4, 9, 16]
CASES = [("main", "markov"), ("main", "causal"), ("small", "markov"), ("plain", "markov"), ("plain", "causal")]
NO_CLASS = torch.zeros(2, dtype=torch.int64)
# the published sampling loop: names are in the fixture's settings
RUNS = [
    ("main", "markov", ("greedy_full", "greedy_off2", "greedy_on2_off3", "filtered", "smooth")),
    ("main", "causal", ("greedy_full", "greedy_off2", "filtered")),
    ("small", "markov", ("greedy_off3",)),
    ("plain", "markov", ("greedy_full",)),
    ("plain", "causal", ("greedy_full",)),
]


@pytest.fixture(scope="module")
def published(golden):
    """(name, mask) -> (prior with the published weights, our key -> published key); do not modify the priors."""
    built = {}

    def build(name, mask="markov"):
        if (name, mask) not in built:
            raw = golden.tensors(f"switti/{name}_state.safetensors")
            # stored as float16 numbers; cast here, so that weights can be found again by their memory
            raw = {key: value.float() if value.is_floating_point() else value for key, value in raw.items()}
            if mask == "causal":
                raw["attn_bias_for_masking"] = inputs(golden, name, mask)["in.attn_bias_for_masking"]
            settings = golden.json("switti/config.json")["networks"][name]
            rotary = {"rope_base": settings["rope_theta"], "rope_extent": settings["rope_size"]}
            converted = convert_switti_state(
                raw, num_heads=settings["num_heads"], **(rotary if settings["rope"] else {})
            )
            assert set(converted.dropped) == {"lvl_1L", "attn_bias_for_masking"}
            built[name, mask] = build_prior(converted), published_names(raw, converted.state)
        return built[name, mask]

    return build


def inputs(golden, name, mask="markov"):
    io = golden.tensors(f"switti/{name}_io.safetensors")
    if mask == "markov":
        return dict(io)
    same = {key: value for key, value in io.items() if key.startswith("in.")}
    return same | golden.tensors(f"switti/{name}_causal_io.safetensors")


def texts(io) -> TextFeatures:
    """Those of the images, and the null text behind them."""
    return TextFeatures(io["in.text_hidden"], io["in.text_mask"], io["in.text_pooled"])


def run(prior, io):
    """Logits of all scales at once."""
    text, sizes = texts(io).rows(slice(2)), io.get("in.image_sizes")
    return prior(NO_CLASS, io["in.x_wo_first_l"], text, image_sizes=sizes).logits


@pytest.mark.parametrize(("name", "mask"), CASES)
@torch.no_grad()
def test_blocks_and_logits(published, golden, name, mask):
    (prior, _), io = published(name, mask), inputs(golden, name, mask)
    assert prior.config["scale_attention"] == mask
    behind = []
    hooks = [block.register_forward_hook(lambda *call: behind.append(call[-1])) for block in prior.blocks]
    logits = run(prior, io)
    for hook in hooks:
        hook.remove()
    for i, x in enumerate(behind):
        assert_parity(x, io[f"out.block{i}"], ATOL)
    assert_parity(logits, io["out.logits"], ATOL)
    # the frozen frequencies count as parameters there
    frozen = 0 if prior.size_condition is None else prior.size_condition.frequency_bits.numel()
    count = golden.json("switti/config.json")["networks"][name]["params"]
    assert sum(p.numel() for p in prior.parameters()) + frozen == count


@torch.no_grad()
def test_branches_of_the_first_block(published, golden):
    (prior, _), io = published("main"), inputs(golden, "main")
    text = texts(io).rows(slice(2))
    conditioning = prior.condition(NO_CLASS, text, io["in.image_sizes"])
    assert_parity(conditioning.start, io["out.condition"], ATOL)
    assert_parity(prior.size_condition(io["in.image_sizes"]), io["out.crop_vector"], ATOL)
    assert_parity(conditioning.blocks[0].flatten(1), io["out.block0.modulation"], ATOL)
    block, seen = prior.blocks[0], {}
    assert_parity(block.text_norm(text.hidden), io["out.block0.context_normed"], ATOL)
    names = {"self_attention": "attention", "cross_attention": "cross_attention", "feed_forward": "feed_forward"}
    hooks = [
        block.get_submodule(name).register_forward_hook(lambda *call, branch=branch: seen.update({branch: call[-1]}))
        for branch, name in names.items()
    ]
    x = prior.embed(conditioning.start, io["in.x_wo_first_l"], range(4))
    assert_parity(x, io["out.embedded"], ATOL)
    rotary = torch.cat([scale_rotary_table(side, 64) for side in (1, 2, 3, 4)])
    assert_parity(rotary, io["out.rope"], ATOL)
    block(x, conditioning.blocks[0], rotated(markov_attention(LENGTHS), rotary), None, conditioning.text[0])
    for hook in hooks:
        hook.remove()
    for branch in names:
        assert_parity(seen[branch], io[f"out.block0.{branch}"], ATOL)


@pytest.mark.parametrize(("name", "mask"), CASES)
def test_loss_and_gradients(published, golden, name, mask):
    (prior, names), io = published(name, mask), inputs(golden, name, mask)
    for text in ("text_hidden", "text_pooled"):
        io[f"in.{text}"].requires_grad_()
    targets = torch.cat([io[f"in.idx.{k}"] for k in range(4)], dim=1).long().flatten()
    logits = run(prior, io).flatten(0, 1)
    for smoothing in (0, 0.1):
        if f"out.loss_smoothing{smoothing}" in io:
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
            assert_parity(loss, io[f"out.loss_smoothing{smoothing}"], ATOL)
    prior.zero_grad()
    F.cross_entropy(logits, targets).backward()
    gradients = {names[key]: parameter.grad for key, parameter in prior.named_parameters()}
    settings = golden.json("switti/config.json")["networks"][name]
    if mask == "causal":
        for key, norm in settings["grad_norm_causal"].items():
            if norm is not None:
                assert float(gradients[key].norm()) == pytest.approx(norm, rel=1e-4), key
        return
    learned = {key: summary for key, summary in settings["grad_norm_and_sum"].items() if summary is not None}
    assert set(learned) == set(gradients)
    for key, (norm, total) in learned.items():
        assert_gradient_summary(key, gradients[key], norm, total)
    gradients |= {part: io[f"in.{part}"].grad[:2] for part in ("text_hidden", "text_pooled")}
    for key, expected in io.items():
        if key.startswith("grad."):
            assert_gradient(gradients[key.removeprefix("grad.")], expected)


def sampling_of(settings) -> SamplingOptions:
    """Our options for published ones: scales count from 0, and off is the first that is not guided any more."""
    first, off = settings.get("turn_on_cfg_start_si", 0), settings["turn_off_cfg_start_si"]
    late = settings.get("last_scale_temp")
    smooth = (
        SmoothSchedule(settings["smooth_start_si"], off - 1, filtered=False) if "more_smooth" in settings else False
    )
    return SamplingOptions(
        guidance_scale=GuidanceSchedule("linear", 1.0, 1 + settings["cfg"], off - 1 if off < 4 else None, first),
        top_k=settings["top_k"],
        top_p=settings["top_p"],
        temperature=1.0 if late is None else tuple(late if k >= max(first, off) else 1.0 for k in range(4)),
        smooth=smooth,
    )


@pytest.mark.parametrize(("name", "mask", "what"), [(name, mask, what) for name, mask, all in RUNS for what in all])
@torch.no_grad()
def test_generation(published, golden, tokenizer, name, mask, what):
    (prior, _), io = published(name, mask), inputs(golden, name)
    settings = golden.json("switti/config.json")["networks"][name]["generations"][f"{mask}.{what}"]
    expected = golden.tensors(f"switti/{name}_{'causal_' if mask == 'causal' else ''}generation.safetensors")
    options = sampling_of(settings)
    asked = AskedTexts(texts(io), torch.tensor([0, 1]))
    sampler = ScaleSampler(tokenizer, prior, NO_CLASS, [(7, 0), (7, 1)], options, texts=asked)
    features, mixed_before = sampler.start(), False
    for k in range(4):
        draw = sampler.draw(k, sampler.predict(k, features))
        mixed = options.smoothing is not None and options.smoothing.covers(k)
        # what guidance, a low temperature and mixtures of codes make of 5e-6 (README of the fixtures)
        atol = max(ATOL, (1 + 2 * settings["cfg"] * k / 3) * 5e-6, ATOL / options.temperature_at(k))
        assert_parity(draw.logits, expected[f"{what}.logits.{k}"], 1e-3 if mixed_before else atol)
        if not mixed:
            assert_parity(draw.token_ids, expected[f"{what}.idx.{k}"].long())
        if f"{what}.codes.{k}" in expected:
            assert_parity(draw.codes, expected[f"{what}.codes.{k}"].view_as(draw.codes), 1e-4)
        features, mixed_before = sampler.add(k, features, draw.codes), mixed_before or mixed
    assert_parity((tokenizer.decode_features(features) + 1).clamp(0, 2) / 2, expected[f"{what}.image01"], 1e-4)


def test_rotary_tables_and_size_features(golden):
    tables = golden.tensors("switti/tables.safetensors")
    for side in (1, 2, 3, 9):
        assert_parity(scale_rotary_table(side, 64), tables[f"rope.c64_side{side}"], ATOL)
    for side in (32, 64):
        grid = scale_rotary_table(side, 64).unflatten(0, (side, side))
        expected = torch.cat([grid[0, ::8], grid[::8, 0]])
        assert_parity(expected, tables[f"rope.c64_side{side}_first_row_and_column"], ATOL)
    values = crop_values(tables["crop.sizes"])
    assert_parity(values, tables["crop.values"])
    assert_parity(fourier_features(values, tables["crop.frequencies"]), tables["crop.features"], 0.0)
    small = golden.tensors("switti/small_io.safetensors")["out.rope"]
    sides = [scale_rotary_table(side, 8, base=100.0, extent=16.0) for side in (1, 2, 3, 4)]
    assert_parity(torch.cat(sides), small, ATOL)


@torch.no_grad()
def test_size_features_of_images(published, golden):
    (prior, _), io = published("main"), inputs(golden, "main")
    values = crop_values(io["in.image_sizes"])
    assert_parity(values, io["out.crop_values"])
    frequencies = prior.size_condition.frequency_bits.view(torch.float32)
    assert_parity(fourier_features(values, frequencies), io["out.crop_features"], 0.0)


def test_keys_come_before_values():
    # laid out as the fused matrix of the published files
    attention = TextCrossAttention(4, 1, 4)
    with torch.no_grad():
        attention.kv.weight.copy_(torch.cat([torch.zeros(4, 4), torch.eye(4)]))
        attention.kv.bias.zero_()
    words = torch.randn(1, 3, 4)
    text = attention.keys_values(words, torch.ones(1, 3, dtype=torch.bool))
    assert not text.keys.any() and torch.equal(text.values[:, 0], words)
