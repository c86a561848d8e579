"""Blocks that read a text: Switti's, and what VAR's block adds to read one.

Source: Voronov et al., "Switti: Designing Scale-Wise Transformers for Text-to-Image Synthesis", section 3 (spec of
Switti, 2 to 4): RMS norms before and after every branch ("sandwich"), queries and keys normalised over the whole width,
rotary positions on grids whose corners coincide, and in every block a look at the words of the prompt. What depends on
the prompt alone (modulations, keys and values) is computed once per image, not once per scale.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.nn.attention import (
    Attend,
    FeedForward,
    Heads,
    Seen,
    TextKeysValues,
    attention_to_words,
    reciprocal_norm,
    trains_on_cpu,
)
from isthmus.nn.rotary import RotaryTable, rotary_table

_EPS = 1e-6  # of every norm here

Stream = Float[Tensor, "b l width"]
Words = Float[Tensor, "b seen text_width"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) over the last axis, in fp32, back in the type of `x`, and then times the weight.

    torch's own multiplies before it rounds to bf16: the same in fp32 alone.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Same shape as the input; the wider of the types of input and weight."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=_EPS).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """Linear(silu(gate(x)) * up(x)), all three without bias (Shazeer, "GLU Variants Improve Transformer")."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
        """Same shape as the input."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def scale_rotary_table(side: int, head_width: int, *, base: float = 10_000.0, extent: float = 128.0) -> RotaryTable:
    """Table of a scale's tokens, row by row, on the CPU (`rotated`): column and row lie at 0..extent at any side.

    Half the pairs turn with the column (first) and half with the row. Raises UserError where `head_width` is not a
    multiple of 4.

    >>> one, two = (scale_rotary_table(side, 8) for side in (2, 3))
    >>> torch.equal(one[3], two[8])  # the last corner
    True
    """
    if head_width % 4:
        raise UserError(f"heads must be a multiple of 4 wide (pairs of channels for two axes), got {head_width}.")
    positions = torch.arange(side, dtype=torch.float64) * extent / max(side - 1, 1)
    axis = rotary_table(positions, head_width // 2, base)
    column, row = axis.expand(side, -1, -1, -1), axis[:, None].expand(-1, side, -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)


def _heads(x: Stream, num_heads: int) -> Heads:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _normed(x: Stream, dtype: torch.dtype) -> Stream:
    """Mean 0 and variance 1 over the whole width, before it is cut into heads; autocast would leave it in fp32."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS).to(dtype)


class SandwichAttention(nn.Module):
    """Self-attention with queries and keys normalised over the whole width; scores are scaled by 1 / sqrt(head width).

    Unlike in VAR's attention keys have a bias, and no temperature is learned.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Stream, attend: Attend) -> Stream:
        """Mix the tokens with `attend(q, k, v, softmax_scale)`."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (_heads(t, self.num_heads) for t in (_normed(q, v.dtype), _normed(k, v.dtype), v))
        mixed = attend(q, k, v, 1 / math.sqrt(v.shape[-1]))
        return self.proj(mixed.transpose(1, 2).flatten(2).to(v.dtype))


class TextCrossAttention(nn.Module):
    """Queries from the tokens of a scale, keys and values from the words of a prompt; neither has a position.

    Queries and keys are normalised over the whole width.
    """

    def __init__(self, width: int, num_heads: int, text_width: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def keys_values(self, words: Words, mask: Bool[Tensor, "b seen"]) -> TextKeysValues:
        """Keys and values of prompts; they serve all scales. At least one word of each must count."""
        k, v = self.kv(words).chunk(2, dim=-1)
        return TextKeysValues(_heads(_normed(k, v.dtype), self.num_heads), _heads(v, self.num_heads), mask)

    def forward(self, x: Stream, text: TextKeysValues) -> Stream:
        """What each token makes of the words of its image's prompt."""
        q = _heads(_normed(self.q(x), text.values.dtype), self.num_heads)
        mixed = attention_to_words(q, text.keys, text.values, text.mask, 1 / math.sqrt(q.shape[-1]))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class SharedTextAttention(nn.Module):
    """Keys and values of words for the first heads of every block's own attention, in a softmax of their own.

    The queries are those that look at tokens, so a token costs no projection more, and one product makes the keys and
    values of all blocks. What is seen of words is added behind a gate that is zero at the start: a model that gets the
    words is the one it was, bit for bit, until it is trained.

    Args:
        num_layers: blocks.
        num_heads: heads of each that look at words, `head_width` wide.
        text_width: of the vector of a word.
        unit_keys: keys of length 1 times a learned factor per head, for blocks whose queries have unit length.
    """

    def __init__(self, num_layers: int, num_heads: int, head_width: int, text_width: int, *, unit_keys: bool):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(text_width, eps=_EPS)
        self.kv = nn.Linear(text_width, num_layers * 2 * num_heads * head_width)
        self.log_scale = nn.Parameter(torch.zeros(num_layers, num_heads, 1)) if unit_keys else None
        self.gate = nn.Parameter(torch.zeros(num_layers, num_heads, head_width))

    def forward(self, words: Words, mask: Bool[Tensor, "b seen"]) -> tuple[TextKeysValues, ...]:
        """What each block sees of prompts, for all scales. At least one word of each must count."""
        layers, heads, width = self.gate.shape
        # a batch of captions is half padding
        places = mask.flatten().nonzero().squeeze(1) if trains_on_cpu(words) and len(words) > 1 else None
        rows = words.flatten(0, 1) if places is None else words.flatten(0, 1)[places]
        k, v = self.kv(self.norm(rows)).unflatten(-1, (layers, 2, heads, width)).unbind(2)
        if self.log_scale is not None:
            k = k * (reciprocal_norm(k) * self.log_scale.exp())

        def laid_out(x: Float[Tensor, "rows layers heads c"]) -> tuple[Seen, ...]:
            if places is not None:
                x = x.new_zeros(mask.numel(), *x.shape[1:]).index_copy(0, places, x)
            return x.unflatten(0, mask.shape).permute(2, 0, 3, 1, 4).unbind(0)

        pairs = zip(laid_out(k.to(v.dtype)), laid_out(v * self.gate.to(v.dtype)), strict=True)
        return tuple(TextKeysValues(keys, values, mask) for keys, values in pairs)


def crop_values(image_sizes: Int[Tensor, "b 2"]) -> Int[Tensor, "b 4"]:
    """Height and width of images whose shorter side was made 512, and top and left of the crop in their middle.

    `image_sizes` are the original height and width. 512 is a constant of the published networks, whatever they draw;
    so is the arithmetic (fp32, cut off), which makes 511 of some sizes.

    >>> crop_values(torch.tensor([[768, 512], [431, 640]])).tolist()
    [[768, 512, 128, 0], [511, 760, 0, 124]]
    """
    ratio = 512 / image_sizes.amin(dim=1, keepdim=True).float()
    resized = (image_sizes.float() * ratio).int()
    offsets = torch.div(resized - 512, 2, rounding_mode="floor").clamp(min=0)
    return torch.cat([resized, offsets], dim=1)


def fourier_features(values: Int[Tensor, "b n"], frequencies: Float[Tensor, " f"]) -> Float[Tensor, "b features"]:
    """Sines, then cosines of 2 pi value * frequency, one value behind the other: (b, 2 n f), in fp32.

    Angles reach thousands of radians, where the order of the products matters: it is the published one.
    """
    angles = values.float()[..., None] * frequencies.float() * 2 * math.pi
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class SizeCondition(nn.Module):
    """A vector per image from its original size: a linear image of Fourier features (spec of Switti, 2.1).

    Raises UserError where `width` is not a multiple of 8.
    """

    # The frequencies, kept as the bits of fp32 numbers: whole numbers stay what they are where a model is cast to bf16,
    # which would make noise of the angles.
    frequency_bits: Int[Tensor, " f"]

    def __init__(self, width: int):
        super().__init__()
        if width % 8:
            raise UserError(f"width must be a multiple of 8 for a size condition, got {width}.")
        # normal_, not randn: it is left out where a network has shapes alone (`without_values`)
        self.register_buffer("frequency_bits", torch.empty(width // 8).normal_().view(torch.int32))
        self.projection = nn.Linear(width, width)

    def forward(self, image_sizes: Int[Tensor, "b 2"]) -> Float[Tensor, "b width"]:
        """From original height and width in pixels; (512, 512) where there was no original."""
        features = fourier_features(crop_values(image_sizes), self.frequency_bits.view(torch.float32))
        return self.projection(features.to(self.projection.weight.dtype))


class SandwichBlock(nn.Module):
    """Attention, a look at the text and feed-forward, each between two RMS norms (spec of Switti, 4).

    Gates multiply behind the second norm. The look at the text has neither gate nor modulation.

    Args:
        width: width of the residual stream.
        num_heads: attention heads.
        feed_forward: `FeedForward` or `SwiGLU` of that width.
        text_width: of the vector of a word; None for a block that sees no words.
        size_condition: learn how much of the vector of the size (`SizeCondition`) goes into the modulation.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        feed_forward: FeedForward | SwiGLU,
        *,
        text_width: int | None,
        size_condition: bool,
    ):
        super().__init__()
        self.attention_norm_in, self.attention_norm_out = RMSNorm(width), RMSNorm(width)
        self.attention = SandwichAttention(width, num_heads)
        self.cross_attention = None
        if text_width is not None:
            self.text_norm = RMSNorm(text_width)
            self.cross_attention_norm_in, self.cross_attention_norm_out = RMSNorm(width), RMSNorm(width)
            self.cross_attention = TextCrossAttention(width, num_heads, text_width)
        self.feed_forward_norm_in, self.feed_forward_norm_out = RMSNorm(width), RMSNorm(width)
        self.feed_forward = feed_forward
        self.modulation = nn.Linear(width, 6 * width)
        self.size_scale = nn.Parameter(torch.zeros(1, width)) if size_condition else None

    def modulate(
        self, start: Float[Tensor, "b width"], size: Float[Tensor, "b width"] | None
    ) -> Float[Tensor, "b 6 width"]:
        """Gates, scales and shifts of images from the vector of their text, and that of their size where it counts."""
        if self.size_scale is not None:
            assert size is not None, "a block with a size condition is given it"
            start = start + self.size_scale * size
        return self.modulation(F.silu(start)).unflatten(-1, (6, -1))

    def keys_values(self, words: Words, mask: Bool[Tensor, "b seen"]) -> TextKeysValues | None:
        """What the block sees of prompts, for all scales; None where it sees no words."""
        return None if self.cross_attention is None else self.cross_attention.keys_values(self.text_norm(words), mask)

    def forward(
        self,
        x: Stream,
        modulation: Float[Tensor, "b 6 width"],
        attend: Attend,
        keep: Float[Tensor, "b 2"] | None = None,
        text: TextKeysValues | None = None,
    ) -> Stream:
        """The stream behind the block.

        `keep` multiplies the two gated branches per image, as in VAR's block; `text` is what `keys_values` returned.
        """
        gates = modulation[:, :2] if keep is None else modulation[:, :2] * keep.unsqueeze(-1)
        gate1, gate2 = (g.unsqueeze(1) for g in gates.unbind(1))
        scale1, scale2, shift1, shift2 = (m.unsqueeze(1) for m in modulation[:, 2:].unbind(1))
        attended = self.attention(torch.addcmul(shift1, self.attention_norm_in(x), 1 + scale1), attend)
        x = torch.addcmul(x, gate1, self.attention_norm_out(attended))
        if self.cross_attention is not None:
            assert text is not None, "a block that sees words is given them"
            x = x + self.cross_attention_norm_out(self.cross_attention(self.cross_attention_norm_in(x), text))
        fed = self.feed_forward(torch.addcmul(shift2, self.feed_forward_norm_in(x), 1 + scale2))
        return torch.addcmul(x, gate2, self.feed_forward_norm_out(fed))

    @torch.no_grad()
    def scale_initial_weights(self, num_layers: int, init_gate: float, init_modulation: float) -> None:
        """Spec of Switti, 4.5, on weights N(0, 1 / (3 width)): outputs of branches and modulations scaled down.

        The output of `SwiGLU` is not, as published.
        """
        outputs = [self.attention.proj]
        if self.cross_attention is not None:
            outputs.append(self.cross_attention.proj)
        if isinstance(self.feed_forward, FeedForward):
            outputs.append(self.feed_forward.down)
        for linear in outputs:
            linear.weight.div_(math.sqrt(2 * num_layers))
        gates, others = self.modulation.weight.unflatten(0, (6, -1)).split((2, 4))
        gates.mul_(init_gate)
        others.mul_(init_modulation)
