"""Filters and draws against the published ones: keep masks, seeded draws, smooth sampling, editing."""

import re

import pytest
import torch
import torch.nn.functional as F

from isthmus.next_scale.canvas import kept_as_published
from isthmus.next_scale.pyramid import tokens_to_map
from isthmus.next_scale.refinement import KnownPart, refined_scales
from isthmus.next_scale.sampling import ScaleSampler
from isthmus.nn.guidance import GuidanceSchedule
from isthmus.nn.sampling import filter_logits, smooth_temperature, smooth_weights
from isthmus.pipelines.options import SamplingOptions
from tests.parity.published_loop import assert_turns, generate
from tests.testers import assert_parity

FILTERS = ["k0_p0.0", "k0_p0.5", "k0_p0.96", "k16_p1.0", "k1_p0.0", "k3_p1e-06", "k4_p0.0", "k6_p0.8"]


def published_draw(filtered: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One multinomial draw per token, all tokens of all images in one call, as the published sampler makes it."""
    weights = filtered.softmax(dim=-1)
    return torch.multinomial(weights.flatten(0, 1), 1, replacement=True, generator=generator).view(weights.shape[:2])


def filters_of(name: str) -> dict:
    """Our filters for a fixture named k<top-k>_p<top-p>, in which 0 stands for off."""
    top_k, top_p = re.fullmatch(r"k(\d+)_p([\d.e-]+)", name).groups()
    return {"top_k": int(top_k) or None, "top_p": float(top_p) or None}


def test_filters_and_seeded_draw(golden):
    io = golden.tensors("var/sampling.safetensors")
    for name in FILTERS:
        filtered = filter_logits(io["in.logits"], **filters_of(name))
        assert_parity(torch.isfinite(filtered), io[f"{name}.keep"].bool())
        drawn = published_draw(filtered, torch.Generator().manual_seed(9))
        assert_parity(drawn.unsqueeze(-1), io[f"{name}.sampled_idx_seed9"])
    for top_p in ("0.25", "0.5"):
        kept = torch.isfinite(filter_logits(torch.full((4,), 1.25), top_p=float(top_p))).sum()
        assert_parity(kept.reshape(1), io[f"four_equal_logits.p{top_p}.number_kept"])


def test_seeded_generation(golden, tokenizer, published_prior):
    io = golden.tensors("var/var_base_io.safetensors")
    name = "gen.sampled_cfg1.5_k20_p0.9_seed5"
    generator = torch.Generator().manual_seed(5)

    def draw(scale, logits):
        filtered = filter_logits(logits, top_k=20, top_p=0.9)
        assert_parity(torch.isfinite(filtered), io[f"{name}.scale{scale}.filtered_is_finite"].bool())
        token_ids = published_draw(filtered, generator)
        return token_ids, tokenizer.lookup(token_ids)

    turns = generate(tokenizer, published_prior("base")[0], io["gen.in.label"], 1.5, draw)
    assert_turns(io, name, turns, tokenizer, 1.5)


def test_smooth_generation(golden, tokenizer, published_prior):
    io = golden.tensors("var/var_base_io.safetensors")
    name = "gen.smooth_cfg3_k20_p0.95_seed5"
    generator = torch.Generator().manual_seed(5)

    def draw(scale, logits):
        at = f"{name}.scale{scale}"
        filtered = filter_logits(logits, top_k=20, top_p=0.95)
        assert_parity(torch.isfinite(filtered), io[f"{at}.filtered_is_finite"].bool())
        token_ids = published_draw(filtered, generator)
        # the published noise comes from the same generator, after the draw: consume it, so that the next draw matches
        noise = -torch.empty_like(logits).exponential_(generator=generator).log()
        assert_parity(noise, io[f"{at}.gumbel_noise"])
        # the temperature falls to 0.0135, which multiplies a rounding error of the logits by up to 150: the weights are
        # compared for equal logits, and every scale goes on from the stored codes
        ratio = scale / 3
        assert smooth_temperature(ratio) == pytest.approx(float(io[f"{at}.tau"]), abs=1e-7)
        stored = filter_logits(io[f"{at}.cfg_logits"], top_k=20, top_p=0.95)
        weights = smooth_weights(stored, io[f"{at}.gumbel_noise"], ratio)
        assert_parity(weights, io[f"{at}.gumbel_soft"])
        assert_parity(tokens_to_map(weights @ tokenizer.codebook.weight), io[f"{at}.h"])
        return token_ids, io[f"{at}.h"]

    turns = generate(tokenizer, published_prior("base")[0], io["gen.in.label"], 3.0, draw)
    assert_turns(io, name, turns, tokenizer, 3.0)


@pytest.mark.parametrize("task", ["inpaint", "outpaint"])
def test_editing(task, golden, tokenizer, published_prior):
    io = golden.tensors("var/var_base_io.safetensors")
    edit = golden.json("var/config.json")["files"]["var_base_state.safetensors + var_base_io.safetensors"]["edit"]
    source = [io[f"edit.in.tokens.{k}"] for k in range(4)]
    # the mask keeps the inside of the box for out-painting, the outside for in-painting; 1 = keep the source
    top, left, bottom, right = (round(corner * 4) for corner in edit["box"])
    keep = torch.full((1, 1, 4, 4), float(task == "inpaint"))
    keep[:, :, top:bottom, left:right] = float(task == "outpaint")
    assert_parity(keep[0, 0], io[f"edit.{task}.in.mask"])

    def draw(scale, logits):
        side = tokenizer.schedule.sizes[scale]
        kept = F.interpolate(keep, size=(side, side), mode="bilinear", align_corners=False) > 0.5
        if side * side <= 3:
            kept = torch.ones_like(kept)
        assert_parity(kept[0, 0].int(), io[f"edit.{task}.keep_mask.scale{scale}"])
        token_ids = filter_logits(logits, top_k=edit["top_k"]).argmax(dim=-1)
        codes = torch.where(kept, tokenizer.lookup(source[scale]), tokenizer.lookup(token_ids))
        return token_ids, codes

    labels = torch.tensor([edit["label"]])
    turns = generate(tokenizer, published_prior("base")[0], labels, edit["cfg"], draw)
    assert_turns(io, f"edit.{task}", turns, tokenizer, edit["cfg"])


@pytest.mark.parametrize("task", ["inpaint", "outpaint"])
def test_the_rule_of_keeping_named_published(task, golden, tokenizer, published_prior):
    """The same numbers from the editing loop that pipelines use, its mask being one of pixels."""
    io = golden.tensors("var/var_base_io.safetensors")
    edit = golden.json("var/config.json")["files"]["var_base_state.safetensors + var_base_io.safetensors"]["edit"]
    unknown = 1 - io[f"edit.{task}.in.mask"].float().view(1, 1, 4, 4)
    mask = F.interpolate(unknown, scale_factor=tokenizer.stride, mode="nearest")
    kept = kept_as_published(mask, tokenizer.schedule.sizes)
    for scale, ours in enumerate(kept):
        assert_parity(
            ours.view_as(io[f"edit.{task}.keep_mask.scale{scale}"]).int(), io[f"edit.{task}.keep_mask.scale{scale}"]
        )
    known = KnownPart(kept, lambda scale, features: io[f"edit.in.tokens.{scale}"])
    options = SamplingOptions(guidance_scale=GuidanceSchedule("linear", 1.0, 1.0 + edit["cfg"]), top_k=edit["top_k"])
    prior = published_prior("base")[0]
    sampler = ScaleSampler(tokenizer, prior, torch.tensor([edit["label"]]), [(0, 0)], options)
    for state in refined_scales(sampler, known=known):
        assert_parity(state.features, io[f"edit.{task}.scale{state.index}.f_hat"])
        free = ~kept[state.index]
        assert_parity(state.token_ids[free], io[f"edit.{task}.scale{state.index}.idx"][free])
    with torch.no_grad():
        assert_parity((tokenizer.decode_features(state.features) + 1) / 2, io[f"edit.{task}.out.image_01"])
