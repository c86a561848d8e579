"""Full-size models on the meta device: keys, shapes and parameter counts of the published files."""

import re

import pytest
import torch

from isthmus.next_scale.conversion import convert_prior_state, convert_switti_state, convert_tokenizer_state
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCALES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
PRIORS = {
    "var_d16_256": (16, SCALES_256, "d16@256"),
    "var_d36_saln_512": (36, SCALES_512, "d36-s@512"),
}
SIZES = {
    "d16@256": (16, SCALES_256, False),
    "d20@256": (20, SCALES_256, False),
    "d24@256": (24, SCALES_256, False),
    "d30@256": (30, SCALES_256, False),
    "d36-s@512": (36, SCALES_512, True),
    "d36@512": (36, SCALES_512, False),
}


def on_meta(shapes, **real):
    """A state dict without storage, apart from the entries given."""
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()} | real


def shapes(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def sizes(golden):
    return golden.json("var/manifests/sizes.json")


def test_tokenizer(golden, sizes):
    manifest = golden.json("var/manifests/vae_ch160v4096z32.json")
    converted = convert_tokenizer_state(on_meta(manifest), SCALES_256)
    with torch.device("meta"):
        tokenizer = MultiScaleVQVAE(**converted.arguments)
        default = MultiScaleVQVAE()
    assert shapes(tokenizer.state_dict()) == shapes(converted.state) == shapes(default.state_dict())
    assert list(converted.dropped) == ["quantize.ema_vocab_hit_SV"]
    published = sizes["vae_ch160v4096z32"]
    assert len(manifest) == published["n_keys"]
    assert count(tokenizer) == published["params"]
    assert count(tokenizer.encoder) == published["encoder"]
    assert count(tokenizer.decoder) == published["decoder"]
    assert count(tokenizer.codebook) + count(tokenizer.phi) == published["quantize"]
    assert tokenizer.stride == 16 and tokenizer.image_size == 256
    assert tokenizer.schedule.phi_indices == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)


@pytest.mark.parametrize("name", PRIORS)
def test_prior(name, golden, sizes):
    depth, scale_sizes, size = PRIORS[name]
    manifest = golden.json(f"var/manifests/{name}.json")
    note = manifest.pop("__note__")
    assert note == f"blocks.1 .. blocks.{depth - 1} repeat blocks.0"
    first = [key for key in manifest if key.startswith("blocks.0.")]
    manifest |= {re.sub(r"\.0\.", f".{i}.", key, count=1): manifest[key] for i in range(1, depth) for key in first}
    level = torch.repeat_interleave(torch.arange(len(scale_sizes)), torch.tensor(scale_sizes) ** 2)
    assert list(level[None].shape) == manifest["lvl_1L"]
    converted = convert_prior_state(on_meta(manifest, lvl_1L=level[None]))
    with torch.device("meta"):
        prior = NextScaleTransformer(**converted.arguments)
    assert shapes(prior.state_dict()) == shapes(converted.state)
    assert set(converted.dropped) == {"lvl_1L", "attn_bias_for_masking"} | {
        f"blocks.{i}.attn.zero_k_bias" for i in range(depth)
    }
    assert converted.arguments["scale_sizes"] == scale_sizes
    assert converted.arguments["num_layers"] == converted.arguments["num_heads"] == depth
    assert converted.arguments["l2_attention"]
    assert count(prior) == sizes[size]["params"]


def test_published_parameter_counts(sizes):
    for size, (depth, scale_sizes, shared_adaln) in SIZES.items():
        published = sizes[size]
        assert published["width"] == 64 * depth
        with torch.device("meta"):
            prior = NextScaleTransformer(
                scale_sizes=scale_sizes,
                width=published["width"],
                num_layers=depth,
                num_heads=published["heads"],
                shared_adaln=shared_adaln,
                drop_path=0.1 * depth / 24,
            )
        assert count(prior) == published["params"], size
        assert count(prior.blocks[0]) == published["block_params"]
        assert prior.schedule.num_tokens == published["L"]
        assert prior.drop_path_rates[-1] == pytest.approx(published["drop_path_max"])


SWITTI = {"switti_d30_512": (SCALES_512, "d30@512"), "switti_d30_1024": (SCALES_1024, "d30@1024")}


@pytest.mark.parametrize("name", SWITTI)
@pytest.mark.parametrize("mask", ["markov", "causal"])
def test_switti(name, mask, golden):
    scale_sizes, size = SWITTI[name]
    published = golden.json("switti/manifests/sizes.json")[size]
    manifest = golden.json(f"switti/manifests/{name}.json")
    assert manifest.pop("__note__") == "blocks.1 .. blocks.29 repeat blocks.0"
    first = [key for key in manifest if key.startswith("blocks.0.")]
    manifest |= {re.sub(r"\.0\.", f".{i}.", key, count=1): manifest[key] for i in range(1, 30) for key in first}
    assert len(manifest) == published["keys"]
    level = torch.repeat_interleave(torch.arange(len(scale_sizes)), torch.tensor(scale_sizes) ** 2)
    assert list(level[None].shape) == manifest["lvl_1L"]
    # one number, seen at every place of the mask
    seen = torch.tensor(0.0 if mask == "causal" else -torch.inf).expand(manifest["attn_bias_for_masking"])
    converted = convert_switti_state(on_meta(manifest, lvl_1L=level[None], attn_bias_for_masking=seen))
    with torch.device("meta"):
        prior = NextScaleTransformer(**converted.arguments)
    assert shapes(prior.state_dict()) == shapes(converted.state)
    assert set(converted.dropped) == {"lvl_1L", "attn_bias_for_masking"}
    assert converted.arguments["scale_sizes"] == scale_sizes and prior.is_markov == (mask == "markov")
    assert converted.arguments["num_layers"] == converted.arguments["num_heads"] == 30
    assert count(prior) == published["trainable"] and count(prior.blocks[0]) == published["block_params"]


def test_switti_parameter_counts(golden):
    for name, published in golden.json("switti/manifests/sizes.json").items():
        size, *without = name.split(", ")
        depth, pixels = size.removeprefix("d").split("@")
        gelu = "gelu" in without
        scales = {"256": SCALES_256, "512": SCALES_512, "1024": SCALES_1024}[pixels]
        with torch.device("meta"):
            prior = NextScaleTransformer(
                scale_sizes=scales,
                width=published["width"],
                num_layers=int(depth),
                num_heads=published["heads"],
                num_classes=0,
                scale_attention="markov",
                l2_attention=False,
                norm="rms_sandwich",
                position="learned" if gelu else "rope2d",
                feed_forward="gelu" if gelu else "swiglu",
                mlp_ratio=4.0 if gelu else 8 / 3,
                size_condition="no crop" not in without,
                text_width=2048,
                text_pooled_width=1280,
            )
        assert count(prior) == published["trainable"], name
        assert count(prior.blocks[0]) == published["block_params"]
        assert prior.schedule.num_tokens == published["L"]
