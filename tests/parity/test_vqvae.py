"""The tokenizer against the published one: latents, indices, features, teacher-forced input, pixels."""

import zlib

import numpy as np
import pytest
import torch

from isthmus.next_scale.conversion import build_tokenizer, convert_tokenizer_state
from isthmus.next_scale.pyramid import bicubic_upsample, next_scale_input
from tests.testers import assert_parity

SCALES = {
    "vqvae_io": (1, 2, 3, 4),
    "vqvae_10scale_io": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "vqvae_full5_io": (1, 2, 3, 4),
}


def weights_by_recipe(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights of the five-level fixture: a function of every key's name (its recipe is in config.json)."""
    state = {}
    for key, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF).standard_normal(shape)
        if len(shape) == 1 and "norm" in key:
            noise = float(key.endswith("weight")) + 0.2 * noise
        elif len(shape) == 4:
            noise = noise / np.sqrt(shape[1] * shape[2] * shape[3])
        elif "embedding" in key:
            noise = 0.5 * noise
        elif "ema_vocab" in key:
            noise = abs(noise)
        else:
            noise = 0.1 * noise
        state[key] = torch.from_numpy(noise.astype(np.float32))
    return state


@pytest.fixture(scope="module")
def five_level(golden):
    recipe = golden.json("var/config.json")["files"]["vqvae_full5_io.safetensors"]
    return build_tokenizer(convert_tokenizer_state(weights_by_recipe(recipe["state_shapes"]), SCALES["vqvae_full5_io"]))


@pytest.fixture(params=SCALES)
def case(request, golden, published_tokenizer):
    """(tokenizer, fixture tensors)."""
    io = golden.tensors(f"var/{request.param}.safetensors")
    if request.param == "vqvae_full5_io":
        return request.getfixturevalue("five_level"), io
    return published_tokenizer(SCALES[request.param]), io


def stored_ids(io):
    return [io[f"out.idx.{k}"] for k in range(sum(key.startswith("out.idx.") for key in io))]


@torch.no_grad()
def test_tokens_features_and_pixels(case):
    tokenizer, io = case
    assert_parity(tokenizer.encoder(io["in.image"]), io["out.encoder"])
    encoded = tokenizer.encode(io["in.image"])
    assert_parity(encoded.latents, io["out.quant_conv_f"])
    for ours, published in zip(encoded.token_ids, stored_ids(io), strict=True):
        assert_parity(ours, published)
    token_ids = stored_ids(io)
    last = len(token_ids) - 1
    for scale in range(last + 1):
        features = tokenizer.features_up_to(token_ids, scale)
        assert_parity(features, io[f"out.f_hat.{scale}"])
        # after the last scale the published function returns the features themselves
        following = next_scale_input(features, tokenizer.schedule, min(scale + 1, last))
        assert_parity(following, io[f"out.next_input.{scale}"].flatten(2).transpose(1, 2))
    assert_parity(tokenizer.scale_inputs(token_ids), io["out.var_wo_first_l"])
    features = tokenizer.features_up_to(token_ids, last)
    assert_parity(tokenizer.decoder(tokenizer.post_quant_conv(features)), io["out.rec_image_unclamped"])
    assert_parity(tokenizer.decode(token_ids), io["out.rec_image"])
    assert_parity(tokenizer(io["in.image"]).images, io["out.rec_image_unclamped"])
    if "out.idx_to_img" in io:
        assert_parity(tokenizer.decode(token_ids), io["out.idx_to_img"])


@torch.no_grad()
def test_progressive_images(golden, tokenizer):
    io = golden.tensors("var/vqvae_io.safetensors")
    for scale in range(4):
        partial = tokenizer.decode_features(tokenizer.features_up_to(stored_ids(io), scale))
        assert_parity(partial, io[f"out.progressive_image.{scale}"])


@torch.no_grad()
def test_growing_resolution_path(golden, published_tokenizer):
    # the published code can also grow the map with the scales; we do not offer it, its parts give it
    for name in ("vqvae_io", "vqvae_10scale_io"):
        tokenizer, io = published_tokenizer(SCALES[name]), golden.tensors(f"var/{name}.safetensors")
        features = None
        for scale, ids in enumerate(stored_ids(io)):
            codes = tokenizer.phi[tokenizer.schedule.phi_indices[scale]](tokenizer.lookup(ids))
            features = codes if features is None else bicubic_upsample(features, codes.shape[-1]) + codes
        assert_parity(tokenizer.decode_features(features), io["out.idx_to_img_not_same_shape_experimental"])


@torch.no_grad()
def test_statistics_of_the_five_levels(golden, five_level):
    io = golden.tensors("var/vqvae_full5_io.safetensors")
    h = five_level.encoder.conv_in(io["in.image"])
    for i, level in enumerate(five_level.encoder.levels):
        h = level(h)
        found = torch.stack([h.mean(), h.std(), h.abs().max()])
        assert_parity(found, io[f"stat.encoder.level{i}.mean_std_absmax"])
