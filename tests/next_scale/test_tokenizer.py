import pytest
import torch
import torch.nn.functional as F

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import bicubic_upsample
from isthmus.next_scale.tokenizer import MultiScaleVQVAE, Phi, ResidualBlock, SpatialAttention, downsample, upsample
from isthmus.nn.stored_llama import _LATER, fingerprint
from tests.testers import TokenizerLaws, randomized


def features(channels: int, side: int = 6) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_downsample_pads_right_and_below_only():
    layer = downsample(3)
    for side in (6, 7):
        x = features(3, side)
        y = layer(x)
        assert y.shape == (2, 3, side // 2, side // 2)
        # the first output sees the first 3 x 3 pixels, the last one a row and a column of zeros where the side is even
        expected = (layer.conv.weight * x[:1, :, :3, :3]).sum(dim=(1, 2, 3)) + layer.conv.bias
        torch.testing.assert_close(y[0, :, 0, 0], expected)
        corner = F.pad(x, (0, 1, 0, 1))[:1, :, 2 * (side // 2) - 2 :, 2 * (side // 2) - 2 :][..., :3, :3]
        expected = (layer.conv.weight * corner).sum(dim=(1, 2, 3)) + layer.conv.bias
        torch.testing.assert_close(y[0, :, -1, -1], expected)


def test_upsample_repeats_pixels():
    layer, x = upsample(3), features(3)
    torch.testing.assert_close(layer(x), layer.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)))


def test_spatial_attention_by_hand():
    layer, x = SpatialAttention(32), features(32, 3)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(dim=-1)  # (b, queries, keys)
    mixed = (weights @ v.transpose(1, 2)).transpose(1, 2).view_as(x)
    torch.testing.assert_close(layer(x), x + layer.proj_out(mixed))


def test_residual_block_by_hand():
    x = features(32)
    for width in (32, 64):
        block = ResidualBlock(32, width)
        h = block.conv1(F.silu(block.norm1(x)))
        h = block.conv2(F.silu(block.norm2(h)))
        torch.testing.assert_close(block(x), h + (x if width == 32 else block.shortcut(x)))


def test_dropout_acts_in_training_only():
    block, x = ResidualBlock(32, 32, dropout=0.5), features(32)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_phi_mixes_by_its_ratio():
    x = features(4)
    for ratio in (0.0, 0.3, 1.0):
        phi = Phi(4, ratio)
        torch.testing.assert_close(phi(x), (1 - ratio) * x + ratio * phi.conv(x))


def test_phi_works_in_the_precision_of_the_map():
    phi, x = Phi(4, 0.5), features(4)
    rounded = Phi(4, 0.5)
    rounded.load_state_dict({key: value.bfloat16().float() for key, value in phi.state_dict().items()})
    assert torch.equal(phi.bfloat16()(x), rounded(x))


ARGUMENTS = {
    "codebook_size": 24,
    "codebook_dim": 4,
    "scale_sizes": (1, 2, 3, 4),
    "base_channels": 32,
    "channel_multipliers": (1, 1),
    "num_res_blocks": 1,
}


def images(batch: int, side: int) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def build(**changes) -> MultiScaleVQVAE:
    return randomized(MultiScaleVQVAE(**ARGUMENTS | changes))


class TestMultiScaleVQVAE(TokenizerLaws):
    @pytest.fixture(
        params=[
            {"phi_indices": (3, 2, 1, 0)},
            {"normalize_codes": True, "num_phi": 1, "scale_sizes": (4,), "channel_multipliers": (1,)},
            {"pixel_unshuffle": 2, "channel_multipliers": (2,), "scale_sizes": (2, 4), "num_phi": 2},
        ],
        ids=["own-phi", "one-scale-cosine", "from-two-folded"],
    )
    def model(self, request):
        return build(**request.param)

    @pytest.fixture
    def inputs(self, model):
        return (images(3, model.image_size),)


def test_derived_schedule_keeps_the_phi_of_every_side():
    tokenizer = build(phi_indices=(0, 3, 1, 2))
    latents = tokenizer.latents(images(2, 8))
    derived = tokenizer.schedule.derive((1, 3, 4))
    assert derived.phi_indices == (0, 1, 2)
    token_ids = tokenizer.requantize(latents, derived)
    assert [ids.shape[1] for ids in token_ids] == [1, 9, 16]
    # the same weights under a schedule of their own give the same tokens, features and inputs
    other = MultiScaleVQVAE(**ARGUMENTS | {"scale_sizes": (1, 3, 4), "phi_indices": (0, 1, 2)})
    other.load_state_dict(tokenizer.state_dict())
    assert all(map(torch.equal, token_ids, other.requantize(latents)))
    assert torch.equal(tokenizer.features_up_to(token_ids, 2, derived), other.features_up_to(token_ids, 2))
    assert torch.equal(tokenizer.scale_inputs(token_ids, derived), other.scale_inputs(token_ids))


@torch.no_grad()
def test_the_residual_loop_by_hand():
    tokenizer = build(scale_sizes=(1, 2), phi_indices=(0, 1), num_phi=2)
    offered = [features(4, 1), features(4, 2)]
    seen = []

    def choose(scale, so_far):
        seen.append(so_far.clone())
        return torch.full((2, (scale + 1) ** 2), scale), offered[scale]

    states = list(tokenizer.residual_scales(choose, offered[0]))
    assert [state.index for state in states] == [0, 1] and not seen[0].any()
    first = tokenizer.phi[0](bicubic_upsample(offered[0], 2))
    assert torch.equal(states[0].features, first) and torch.equal(seen[1], first)  # nor does the next turn change it
    assert torch.equal(states[1].features, first + tokenizer.phi[1](offered[1]))


def test_features_of_fewer_scales_are_the_features_on_the_way():
    tokenizer = build()
    token_ids = tokenizer.encode(images(2, 8)).token_ids
    for scale in range(4):
        fewer = tokenizer.features_up_to(token_ids[: scale + 1], scale)
        assert torch.equal(fewer, tokenizer.features_up_to(token_ids, scale))
    assert torch.equal(
        tokenizer.decode(token_ids[:2]), tokenizer.decode_features(tokenizer.features_up_to(token_ids, 1))
    )


def test_a_code_on_the_grid_is_found_again():
    # one scale and no phi: the features are codes, and the nearest code of a code is itself
    tokenizer = build(scale_sizes=(4,), phi_ratio=0.0)
    token_ids = [torch.randint(24, (2, 16), generator=torch.Generator().manual_seed(0))]
    features = tokenizer.features_up_to(token_ids, 0)
    assert torch.equal(tokenizer.requantize(features)[0], token_ids[0])


def test_normalized_codes_ignore_the_length_of_the_residual():
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    cosine, plain = (build(normalize_codes=flag, scale_sizes=(4,)) for flag in (True, False))
    assert torch.equal(cosine.requantize(latents)[0], cosine.requantize(latents * 100)[0])
    assert not torch.equal(plain.requantize(latents)[0], plain.requantize(latents * 100)[0])


def test_straight_through_passes_the_gradient_of_the_features_on():
    tokenizer = build().train()
    batch = images(2, 8)
    tokenizer(batch).images.square().sum().backward()
    # the codebook gets no gradient from the reconstruction, the encoder does
    assert tokenizer.codebook.weight.grad is None
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_folded_pixels_count_in_the_stride_and_lose_nothing():
    """A network of one 3 x 3 convolution each way that copies what enters gives back every pixel."""
    plain, folded = build(), build(pixel_unshuffle=2, channel_multipliers=(1,))
    assert (folded.stride, folded.image_size) == (plain.stride, plain.image_size)
    assert folded.encoder.conv_in.in_channels == folded.decoder.conv_out.out_channels == 12
    x = images(2, 8)
    assert torch.equal(F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), x)
    with torch.no_grad():  # a last convolution without weights says which place of a square each channel is
        folded.decoder.conv_out.weight.zero_()
        folded.decoder.conv_out.bias.copy_(torch.arange(12.0))
    pixels = folded.decoder(torch.zeros(1, 4, 4, 4))
    assert torch.equal(pixels[0, 1, :2, :2], torch.tensor([[4.0, 5.0], [6.0, 7.0]]))


def test_models_saved_before_pixels_could_be_folded_keep_their_fingerprint():
    model = build()
    before = fingerprint(model)
    assert model.config["pixel_unshuffle"] == 1 and "pixel_unshuffle" in _LATER
    assert fingerprint(build(pixel_unshuffle=1)) == before != fingerprint(build(pixel_unshuffle=2))


def test_bad_inputs_are_named():
    for changes, said in [
        ({"scale_sizes": (1, 3, 2)}, "increase"),
        ({"phi_indices": (0, 1, 2, 4)}, "0..3"),
        ({"phi_ratio": 1.5}, r"\[0, 1\]"),
        ({"base_channels": 48}, "multiple of 32"),
        ({"pixel_unshuffle": 0}, "at least 1"),
    ]:
        with pytest.raises(UserError, match=said):
            build(**changes)
    tokenizer = build()
    token_ids = tokenizer.encode(images(1, 8)).token_ids
    with pytest.raises(UserError, match="8 x 8 .* got 9 x 8"):
        tokenizer.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(UserError, match=r"scale must lie in 0\.\.3"):
        tokenizer.features_up_to(token_ids, 4)
    with pytest.raises(UserError, match="tokens per scale"):
        tokenizer.decode(token_ids[1:])
