import pytest
import torch
import torch.nn.functional as F

from isthmus.next_scale.tokenizer import Downsample, Phi, ResidualBlock, SpatialAttention, Upsample


def features(channels: int, side: int = 6) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("side", [6, 7])
def test_downsample_pads_right_and_below_only(side):
    layer, x = Downsample(3), features(3, side)
    y = layer(x)
    assert y.shape == (2, 3, side // 2, side // 2)
    # the first output sees the first 3 x 3 pixels, the last one a row and a column of zeros where the side is even
    expected = (layer.conv.weight * x[:1, :, :3, :3]).sum(dim=(1, 2, 3)) + layer.conv.bias
    torch.testing.assert_close(y[0, :, 0, 0], expected)
    corner = F.pad(x, (0, 1, 0, 1))[:1, :, 2 * (side // 2) - 2 :, 2 * (side // 2) - 2 :][..., :3, :3]
    expected = (layer.conv.weight * corner).sum(dim=(1, 2, 3)) + layer.conv.bias
    torch.testing.assert_close(y[0, :, -1, -1], expected)


def test_upsample_repeats_pixels():
    layer, x = Upsample(3), features(3)
    torch.testing.assert_close(layer(x), layer.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)))


def test_spatial_attention_by_hand():
    layer, x = SpatialAttention(32), features(32, 3)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)
    weights = (q.transpose(1, 2) @ k / 32**0.5).softmax(dim=-1)  # (b, queries, keys)
    mixed = (weights @ v.transpose(1, 2)).transpose(1, 2).view_as(x)
    torch.testing.assert_close(layer(x), x + layer.proj_out(mixed))


@pytest.mark.parametrize("channels", [(32, 32), (32, 64)])
def test_residual_block_by_hand(channels):
    block, x = ResidualBlock(*channels), features(32)
    h = block.conv1(F.silu(block.norm1(x)))
    h = block.conv2(F.silu(block.norm2(h)))
    skipped = x if channels[0] == channels[1] else block.shortcut(x)
    torch.testing.assert_close(block(x), skipped + h)


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
