"""The multi-scale image tokenizer of next-scale transformers, with its convolutional leaves.

Source: Tian et al., "Visual Autoregressive Modeling", section 3.2 (published network: 108.9M parameters, stride 16;
spec of VAR, 1.2: every width is a multiple of 32).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import (
    Scale,
    ScaleSchedule,
    area_downsample,
    bicubic_upsample,
    default_phi_indices,
    next_scale_input,
    tokens_to_map,
)
from isthmus.nn.precision import whole_fp32
from isthmus.nn.quantization import nearest_code
from isthmus.nn.saved_model import SavedModel, records_arguments
from isthmus.nn.shapes import FeatureMap, Images, LatentMap, ScaleTokens, TokenPyramid

Map = Float[Tensor, "b c h w"]


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups with eps 1e-6, as in the published tokenizer."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3x3 convolution that keeps the side."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


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
    """x + conv(silu(norm(conv(silu(norm(x)))))), dropout before the last; a 1x1 convolution on x where widths differ"""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
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


def downsample(channels: int) -> nn.Sequential:
    """Halve the side: one pixel of zeros right and below, then a 3x3 convolution of stride 2."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels: int) -> nn.Sequential:
    """Double the side: nearest neighbour, then a 3x3 convolution."""
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2.0), conv=conv3x3(channels, channels)))


def middle(channels: int, dropout: float) -> nn.Sequential:
    """Residual block, attention, residual block at the lowest resolution."""
    # made in this order, which is that of their first random numbers
    first, attention = ResidualBlock(channels, channels, dropout), SpatialAttention(channels)
    last = ResidualBlock(channels, channels, dropout)
    return nn.Sequential(OrderedDict(block1=first, attention=attention, block2=last))


class Phi(nn.Module):
    """phi(h) = (1 - ratio) h + ratio conv(h): mixes an upsampled scale with its neighbourhood (VAR, algorithm 1)."""

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.ratio = ratio
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Map) -> Map:
        """Map of the same shape."""
        # in the type of the map: the features stay fp32 where the weights were cast to less
        assert self.conv.bias is not None
        mixed = F.conv2d(x, self.conv.weight.to(x.dtype), self.conv.bias.to(x.dtype), padding=1)
        return torch.lerp(x, mixed, self.ratio)


@dataclass
class EncoderOutput:
    """What `MultiScaleVQVAE.encode` returns: token ids (b, s_k * s_k) per scale, and the map before quantisation."""

    token_ids: TokenPyramid
    latents: LatentMap


@dataclass
class MultiScaleVQVAEOutput:
    """What training reads.

    Attributes:
        images: the reconstruction, not clamped.
        token_ids: empty where quantisation was left out.
        latents: the map before quantisation.
        codebook_loss: mean over scales of mse(features_k, sg(latents)).
        commitment_loss: mean over scales of mse(sg(features_k), latents), not yet weighted.
    """

    images: Images
    token_ids: TokenPyramid
    latents: LatentMap
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]


class Level(nn.Module):
    """Blocks of one resolution, attention after each where asked, then a change of resolution (or none)."""

    def __init__(self, widths: Sequence[int], dropout: float, attends: bool, resample: Callable[[int], nn.Module]):
        super().__init__()
        pairs = list(pairwise(widths))
        self.blocks = nn.ModuleList(ResidualBlock(a, b, dropout) for a, b in pairs)
        self.attentions = nn.ModuleList(SpatialAttention(b) if attends else nn.Identity() for _, b in pairs)
        self.resample = resample(widths[-1])

    def forward(self, x: Map) -> Float[Tensor, "b next_c next_h next_w"]:
        """Map at the next resolution."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Encoder(nn.Module):
    """Pixels to latents: levels from the highest resolution down, attention at the lowest."""

    def __init__(self, widths: Sequence[int], num_res_blocks: int, codebook_dim: int, dropout: float, fold: int):
        super().__init__()
        last = len(widths) - 1
        self.fold = fold
        self.conv_in = conv3x3(3 * fold**2, widths[0])
        self.levels = nn.ModuleList(
            Level(
                [widths[max(i - 1, 0)]] + [width] * num_res_blocks,
                dropout,
                attends=i == last,
                resample=nn.Identity if i == last else downsample,
            )
            for i, width in enumerate(widths)
        )
        self.middle = middle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], codebook_dim)

    def forward(self, images: Images) -> LatentMap:
        """Latents before `quant_conv`."""
        h = self.conv_in(F.pixel_unshuffle(images, self.fold) if self.fold > 1 else images)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Latents to pixels. Levels are indexed as in the encoder (0 = highest resolution) and run backwards."""

    def __init__(self, widths: Sequence[int], num_res_blocks: int, codebook_dim: int, dropout: float, fold: int):
        super().__init__()
        last = len(widths) - 1
        self.fold = fold
        self.conv_in = conv3x3(codebook_dim, widths[-1])
        self.middle = middle(widths[-1], dropout)
        self.levels = nn.ModuleList(
            Level(
                [widths[min(i + 1, last)]] + [width] * (num_res_blocks + 1),
                dropout,
                attends=i == last,
                resample=nn.Identity if i == 0 else upsample,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3x3(widths[0], 3 * fold**2)

    def forward(self, latents: LatentMap) -> Images:
        """Pixels, not clamped."""
        h = self.middle(self.conv_in(latents))
        for level in reversed(self.levels):
            h = level(h)
        pixels = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(pixels, self.fold) if self.fold > 1 else pixels


class MultiScaleVQVAE(SavedModel):
    """Convolutional autoencoder whose latent map is quantised residually over a pyramid of scales.

    Args:
        codebook_size: number of codes.
        codebook_dim: width of a code.
        scale_sizes: sides of the scales, coarse to fine; the last is the side of the latent map.
        phi_indices: which phi follows each scale; None takes the published rule.
        num_phi: number of phi convolutions (1: one for all scales).
        phi_ratio: share of the convolution in phi, in [0, 1]; 0 leaves phi out.
        base_channels: width of the first level; every width is a multiple of 32.
        channel_multipliers: one factor on `base_channels` per level; the stride is 2 ** (levels - 1), times
            `pixel_unshuffle`.
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        normalize_codes: compare directions instead of positions (the vector looked up stays the raw row).
        commitment_weight: weight of the commitment loss beside the codebook loss ("beta").
        dropout: rate inside residual blocks.
        pixel_unshuffle: side of the squares of pixels that enter as channels of one place, and come back as pixels at
            the exit: convolutions at full resolution are bound by memory, and 2 leaves a quarter of the places. 1 is
            off, as in the published network.

    Raises UserError where the schedule does not increase, or an argument is out of its range.

    >>> tokenizer = MultiScaleVQVAE(
    ...     codebook_size=16, codebook_dim=4, scale_sizes=(1, 2), base_channels=32, channel_multipliers=(1, 1),
    ...     num_res_blocks=1)
    >>> [tuple(ids.shape) for ids in tokenizer.encode(torch.zeros(3, 3, 4, 4)).token_ids]
    [(3, 1), (3, 4)]
    """

    @records_arguments
    def __init__(
        self,
        *,
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        scale_sizes: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        phi_indices: Sequence[int] | None = None,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        base_channels: int = 160,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        normalize_codes: bool = False,
        commitment_weight: float = 0.25,
        dropout: float = 0.0,
        pixel_unshuffle: int = 1,
    ):
        super().__init__()
        if pixel_unshuffle < 1:
            raise UserError(f"pixel_unshuffle must be at least 1 (off), got {pixel_unshuffle}.")
        if phi_indices is None:
            phi_indices = default_phi_indices(len(scale_sizes), num_phi)
        self.schedule = ScaleSchedule(tuple(scale_sizes), tuple(phi_indices))
        if max(phi_indices) >= num_phi:
            raise UserError(
                f"phi_indices must lie in 0..{num_phi - 1} (num_phi = {num_phi}), got {tuple(phi_indices)}."
            )
        widths = [base_channels * m for m in channel_multipliers]
        if not 0 <= phi_ratio <= 1:
            raise UserError(f"phi_ratio must lie in [0, 1] (0 leaves phi out), got {phi_ratio}.")
        if any(width % 32 for width in widths):
            raise UserError(f"every width must be a multiple of 32 (GroupNorm has 32 groups), got {widths}.")
        self.stride = pixel_unshuffle * 2 ** (len(widths) - 1)
        self.image_size = self.schedule.grid * self.stride

        self.encoder = Encoder(widths, num_res_blocks, codebook_dim, dropout, pixel_unshuffle)
        self.quant_conv = conv3x3(codebook_dim, codebook_dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.phi = nn.ModuleList(Phi(codebook_dim, phi_ratio) for _ in range(num_phi if phi_ratio else 0))
        self.post_quant_conv = conv3x3(codebook_dim, codebook_dim)
        self.decoder = Decoder(widths, num_res_blocks, codebook_dim, dropout, pixel_unshuffle)

    def latents(self, images: Images) -> LatentMap:
        """Images in [-1, 1] to the map before quantisation; UserError for any other side than `image_size`."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"images must be {self.image_size} x {self.image_size} (latent grid {self.schedule.grid} x stride "
                f"{self.stride}), got {images.shape[-2]} x {images.shape[-1]}. Resize them first."
            )
        return self.quant_conv(self.encoder(images))

    @whole_fp32()
    def encode(self, images: Images) -> EncoderOutput:
        """Images in [-1, 1] to token ids of every scale and the latents; UserError as `latents`."""
        latents = self.latents(images)
        return EncoderOutput(self.requantize(latents), latents)

    def decode(self, token_ids: TokenPyramid) -> Images:
        """Token ids of every scale to images in [-1, 1]."""
        return self.decode_features(self.features_up_to(token_ids, len(token_ids) - 1))

    def decode_features(self, features: LatentMap) -> Images:
        """Features (the sum over scales, or over the first few) to images in [-1, 1]."""
        return self._pixels(features).clamp(-1, 1)

    @whole_fp32()
    def requantize(self, latents: LatentMap, schedule: ScaleSchedule | None = None) -> TokenPyramid:
        """Token ids of a latent map, or of features, under this tokenizer's schedule or one that it derives."""
        scales = self.residual_scales(self._search(latents, schedule), latents, schedule)
        return [scale.token_ids for scale in scales]

    def features_up_to(self, token_ids: TokenPyramid, scale: int, schedule: ScaleSchedule | None = None) -> LatentMap:
        """Features after `scale` (from 0): the sum of the codes of scales 0..scale, each upsampled and through phi."""
        for state in self.token_scales(token_ids, schedule):
            if state.index == scale:
                return state.features
        raise UserError(f"scale must lie in 0..{len(token_ids) - 1} (the scales of token_ids), got {scale}.")

    def scale_inputs(self, token_ids: TokenPyramid, schedule: ScaleSchedule | None = None) -> Float[Tensor, "b l d"]:
        """Teacher-forced input of the transformer for scales 1..K-1: (b, L - s_0^2, codebook_dim), in fp32."""
        schedule = schedule or self.schedule
        states = self.token_scales(token_ids[:-1], schedule)
        parts = [next_scale_input(state.features, schedule, state.index + 1) for state in states]
        nothing = self.codebook(token_ids[0][:, :0]).float()  # scale 0 reads no features
        return torch.cat([nothing, *parts], dim=1)

    def lookup(self, token_ids: ScaleTokens) -> FeatureMap:
        """Codes of one scale as a map (b, d, s, s), in fp32 whatever the precision of the weights."""
        return tokens_to_map(self.codebook(token_ids).float())

    def add_codes(
        self, features: LatentMap, codes: FeatureMap, scale: int, schedule: ScaleSchedule | None = None
    ) -> LatentMap:
        """One turn of the residual loop: features plus phi_k of the codes (b, d, s, s) of scale k, upsampled."""
        schedule = schedule or self.schedule
        return features + self._phi(schedule.phi_indices[scale], bicubic_upsample(codes, schedule.grid))

    def nearest_tokens(self, residual: LatentMap, size: int) -> ScaleTokens:
        """Nearest codes of what a scale of this side has left to say: latents minus the features so far."""
        rows = area_downsample(residual, size).permute(0, 2, 3, 1).flatten(0, 2)
        found = nearest_code(rows, self.codebook.weight, normalize=self.config["normalize_codes"])
        return found.view(residual.shape[0], -1)

    def partial_scale_input(
        self,
        features: LatentMap,
        codes: FeatureMap,
        hidden: Bool[Tensor, "b l"],
        scale: int,
        schedule: ScaleSchedule | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Input of `scale` >= 1 that also shows the scale's own codes (b, d, s, s), but for the hidden ones.

        S = Fhat_{k-1} + phi_k(up(codes kept)) - phi_k(0), averaged to the side of the scale (spec of SRDD, 3.2): phi
        has a bias, without the last term "all hidden" would not be the ordinary input. Hidden first, then upsampled:
        no hidden code reaches any place.
        """
        schedule = schedule or self.schedule
        kept = codes.masked_fill(hidden.reshape(len(hidden), 1, *codes.shape[-2:]), 0)
        phi, grid = schedule.phi_indices[scale], schedule.grid
        shown = self._phi(phi, bicubic_upsample(kept, grid))
        nothing = self._phi(phi, torch.zeros_like(shown[:1]))
        return next_scale_input(features + (shown - nothing), schedule, scale)

    def residual_scales(
        self,
        choose: Callable[[int, LatentMap], tuple[ScaleTokens, FeatureMap]],
        like: Tensor,
        schedule: ScaleSchedule | None = None,
    ) -> Iterator[Scale]:
        """Build the features scale by scale, coarse to fine: features += phi_k(upsample(codes_k)), from zeros.

        `choose`, called with (scale, features so far), returns the scale's token ids and their codes as a map
        (b, d, s_k, s_k): encoding searches them, decoding looks them up. `like` is any tensor whose first dimension is
        the batch, on the device to work on.
        """
        schedule = schedule or self.schedule
        shape = (like.shape[0], self.codebook.embedding_dim, schedule.grid, schedule.grid)
        features = torch.zeros(shape, device=like.device, dtype=torch.float32)
        for index in range(schedule.num_scales):
            token_ids, codes = choose(index, features)
            features = self.add_codes(features, codes, index, schedule)
            yield Scale(index, token_ids, features)

    def token_scales(self, token_ids: TokenPyramid, schedule: ScaleSchedule | None = None) -> Iterator[Scale]:
        """The residual loop over tokens that are there: one `Scale` with the features so far for each of them.

        Raises UserError where the numbers of tokens are not those of the first scales of the schedule.
        """
        expected, found = (schedule or self.schedule).lengths, tuple(ids.shape[1] for ids in token_ids)
        if found != expected[: len(found)]:
            raise UserError(
                f"token_ids must hold {expected} tokens per scale (fewer scales are the coarser ones), got {found}. "
                "Pass the token ids of this tokenizer's schedule, or the schedule they were made with."
            )

        if not token_ids:
            return iter(())
        states = self.residual_scales(lambda k, _: (token_ids[k], self.lookup(token_ids[k])), token_ids[0], schedule)
        return islice(states, len(token_ids))

    def forward(self, images: Images, *, quantize: bool = True) -> MultiScaleVQVAEOutput:
        """Reconstruct for training, with the straight-through gradient of the quantiser.

        `quantize=False` decodes the latents themselves (continuous warm-up); both losses are then 0.
        """
        latents = self.latents(images)
        zero = latents.new_zeros(())
        if not quantize:
            return MultiScaleVQVAEOutput(self._pixels(latents), [], latents, zero, zero)
        latents, num_scales = latents.float(), self.schedule.num_scales
        codebook_loss, commitment_loss, token_ids, features = zero.float(), zero.float(), [], latents
        for state in self.residual_scales(self._search(latents, None), latents):
            features = state.features
            token_ids.append(state.token_ids)
            codebook_loss = codebook_loss + F.mse_loss(features, latents.detach())
            commitment_loss = commitment_loss + F.mse_loss(features.detach(), latents)
        pixels = self._pixels(latents + (features - latents).detach())
        return MultiScaleVQVAEOutput(
            pixels, token_ids, latents, codebook_loss / num_scales, commitment_loss / num_scales
        )

    def _pixels(self, features: LatentMap) -> Images:
        # the features are fp32 even where the weights are not
        return self.decoder(self.post_quant_conv(features.to(self.post_quant_conv.weight.dtype)))

    def _phi(self, index: int, codes: FeatureMap) -> FeatureMap:
        if not len(self.phi):
            return codes
        # fp32 under any autocast: the residual of the next scale, hence its tokens, depends on this sum
        with torch.autocast(codes.device.type, enabled=False):
            return self.phi[index](codes)

    def _search(
        self, latents: LatentMap, schedule: ScaleSchedule | None
    ) -> Callable[[int, LatentMap], tuple[ScaleTokens, FeatureMap]]:
        sizes = (schedule or self.schedule).sizes

        def choose(scale: int, features: LatentMap) -> tuple[ScaleTokens, FeatureMap]:
            # detached: the search has no gradient, and the distance matrices stay out of the graph
            token_ids = self.nearest_tokens(latents.detach().float() - features.detach(), sizes[scale])
            return token_ids, self.lookup(token_ids)

        return choose


@torch.no_grad()
@whole_fp32()
def latents_of(image_tokenizer: MultiScaleVQVAE, images: Images) -> LatentMap:
    """Latents of images in [-1, 1], of the tokenizer's size, in fp32 on its device.

    The encoder computes in the type of its weights, so tokens near the border of two codes depend on it.
    """
    device, dtype = image_tokenizer.device, image_tokenizer.dtype
    images = images.to(device, dtype).contiguous(memory_format=_layout(image_tokenizer, device))
    return image_tokenizer.latents(images).float().contiguous()


@torch.no_grad()
def pixels_of(image_tokenizer: MultiScaleVQVAE, features: LatentMap) -> Images:
    """Images in [-1, 1] of features, in the type of the weights, on the device of the features."""
    layout = _layout(image_tokenizer, features.device)
    features = features.to(image_tokenizer.dtype).contiguous(memory_format=layout)
    return image_tokenizer.decode_features(features).contiguous()


def _layout(image_tokenizer: MultiScaleVQVAE, device: torch.device) -> torch.memory_format:
    # the weights stay as they are
    on_cpu = cpu_layout(image_tokenizer.dtype, image_tokenizer.image_size)
    return on_cpu if device.type == "cpu" else torch.contiguous_format
