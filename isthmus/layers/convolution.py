"""Convolutional leaves of the image tokenizer (spec of VAR, 1.2). Every width must be a multiple of 32."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Map = Float[Tensor, "b c h w"]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups with eps 1e-6, as in the published tokenizer."""
    return nn.GroupNorm(32, channels, eps=1e-6)


# Side of images, in pixels, up to which bf16 maps lie channels first. Measured at 32 (decoding takes 46 ms instead of
# 72, a training step 154 instead of 368) and at 128 (decoding takes 195 ms instead of 114).
_SMALL_IMAGE = 64


def cpu_layout(dtype: torch.dtype, image_size: int) -> torch.memory_format:
    """How the maps of images best lie in the memory of a CPU: channels last, but for small images in bf16.

    oneDNN convolves channels-last maps as fast or faster, but a group norm over a small one in bf16 takes long.
    """
    small = dtype != torch.float32 and image_size <= _SMALL_IMAGE
    return torch.contiguous_format if small else torch.channels_last


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes.

    Args:
        in_channels: width of the input, a multiple of 32.
        out_channels: width of the output, a multiple of 32.
        dropout: rate before the second convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Map) -> Float[Tensor, "b out h w"]:
        """Map of the same size, `out_channels` wide."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over the h * w positions of a map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Map) -> Map:
        """Map of the same shape."""
        b, c, h, w = x.shape
        # one head of width c over h * w rows; on a channels-last map the rows are there already
        rows = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, 1, h * w, 3, c)
        mixed = F.scaled_dot_product_attention(*rows.unbind(3))
        return x + self.proj_out(mixed.reshape(b, h, w, c).permute(0, 3, 1, 2))


class Downsample(nn.Module):
    """Halve the side: one pixel of zeros right and below, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Map) -> Float[Tensor, "b c h//2 w//2"]:
        """Map of half the side."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Map) -> Float[Tensor, "b c 2*h 2*w"]:
        """Map of twice the side."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Phi(nn.Module):
    """phi(h) = (1 - ratio) h + ratio conv(h): mixes an upsampled scale with its neighbourhood (VAR, algorithm 1)."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Map) -> Map:
        """Map of the same shape."""
        # in the type of the map: the features stay fp32 where the weights were cast to less
        assert self.conv.bias is not None
        mixed = F.conv2d(x, self.conv.weight.to(x.dtype), self.conv.bias.to(x.dtype), padding=1)
        return torch.lerp(x, mixed, self.ratio)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3x3 convolution that keeps the side."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)
