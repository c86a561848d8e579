"""The pixel decoder of D-AR: a transformer over patches that predicts the velocity of a flow from noise to image.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1; spec of D-AR, 1.5. The published network
has 184.2M parameters without its training-only alignment head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.dar.attention import (
    RotaryCrossAttention,
    RotarySelfAttention,
    check_sides,
    full_attention,
    grid_rotary_table,
    init_linear_layers,
    plain_norm,
)
from isthmus.dar.scheduler import time_waves, velocity_towards
from isthmus.errors import UserError
from isthmus.nn.attention import FeedForward
from isthmus.nn.rotary import RotaryTable
from isthmus.nn.saved_model import SavedModel, records_arguments
from isthmus.nn.shapes import Images

Rows = Float[Tensor, "b l width"]
Canvas = Float[Tensor, "b 3 side side"]
Painted = Float[Tensor, "b n 3 side side"]
KeysValues = tuple[Float[Tensor, "b heads seen c"], Float[Tensor, "b heads seen c"]]


class TokenCanvas(nn.Module):
    """Every token adds to a small image of `side` pixels through a linear map of its own, of low rank.

    As published, a step knows earlier tokens only through the vectors of its own group, where a causal stack takes long
    to gather them; a sum does so from the first step of training on.
    """

    def __init__(self, num_tokens: int, condition_width: int, *, side: int, rank: int):
        super().__init__()
        self.side = side
        self.down = nn.Linear(condition_width, rank)
        self.brushes = nn.Parameter(torch.empty(num_tokens, rank, 3 * side**2))
        self.background = nn.Parameter(torch.empty(3 * side**2))

    def reset_parameters(self) -> None:
        """Maps under which all tokens together paint with a standard deviation of 0.3, on grey."""
        num_tokens, rank, _ = self.brushes.shape
        nn.init.normal_(self.brushes, std=0.3 / (num_tokens * rank) ** 0.5)
        nn.init.zeros_(self.background)

    def forward(self, condition: Float[Tensor, "b n condition_width"], first: int) -> Painted:
        """What each of the tokens first, first + 1, ... adds; the background belongs to token 0."""
        painted = torch.einsum("bnr,nrp->bnp", self.down(condition), self.brushes[first : first + condition.shape[1]])
        if first == 0:
            painted = torch.cat([painted[:, :1] + self.background, painted[:, 1:]], dim=1)
        return painted.unflatten(2, (3, self.side, self.side))


def shown_at(canvas: Canvas, height: int, width: int) -> Images:
    """The small image at the size of the pixels."""
    return F.interpolate(canvas, size=(height, width), mode="bilinear")


@dataclass
class TimeEmbeddings:
    """What depends on the time alone, in fp32: computed once for the fixed steps of a solver; `head` where adaptive."""

    t: Float[Tensor, " n"]
    blocks: tuple[Float[Tensor, "n width"], ...]
    head: Float[Tensor, "n width"] | None = None

    def at(self, index: int) -> "TimeEmbeddings":
        """The time of one step, for a batch of any size."""
        own = slice(index, index + 1)
        head = None if self.head is None else self.head[own]
        return TimeEmbeddings(self.t[own], tuple(rows[own] for rows in self.blocks), head)


class FlowBlock(nn.Module):
    """Self-attention and feed-forward, modulated patch by patch by time plus what cross-attention found in tokens."""

    def __init__(self, width: int, head_width: int, own_time: bool):
        super().__init__()
        self.time_embedding = FeedForward(width, width, activation=F.silu) if own_time else None
        self.condition_embedding = FeedForward(width, width, activation=F.silu)
        self.cross_attention = RotaryCrossAttention(width, head_width)
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = RotarySelfAttention(width, head_width)
        self.feed_forward = FeedForward(width, 4 * width, activation=F.silu)

    def keys_values(self, condition: Float[Tensor, "b seen width"]) -> KeysValues:
        """Keys and values of a token group."""
        return self.cross_attention.keys_values(plain_norm(self.condition_embedding(condition)))

    def forward(self, x: Rows, time: Float[Tensor, "rows width"], keys_values: KeysValues, rotary: RotaryTable) -> Rows:
        """`time` holds one row per image, or one for all."""
        # the norm without parameters serves the cross-attention and the modulated self-attention
        normed = plain_norm(x)
        found = self.cross_attention(normed, keys_values, rotary)
        # time is fp32, so the sum is; the linear layer wants its own type
        signal = F.silu(time.unsqueeze(1) + found).to(found.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(signal).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attention(torch.addcmul(shift1, normed, 1 + scale1), rotary, full_attention))
        return torch.addcmul(x, gate2, self.feed_forward(torch.addcmul(shift2, plain_norm(x), 1 + scale2)))


class FlowDecoder(SavedModel):
    """Velocity of noisy pixels, driven by one group of token conditions.

    Args:
        patch_size: side of a patch in pixels.
        width: width of the residual stream.
        num_layers: blocks.
        condition_width: width of the conditions (`condition_width` of the tokenizer).
        head_width: width of an attention head; divides `width`.
        rotary_base: base of the rotary angles of the patches.
        shared_time_embedding: one time embedding for all blocks, instead of one for each.
        adaptive_head: the time scales and shifts before the last layer; needs `shared_time_embedding`.
        position_table: side of the grid of patches that get a learned position each (images are then square and of this
            one size); None has none.
        prediction: what the last layer stands for: the "velocity", or the clean "image" in the scale of x_t, from which
            the velocity follows as (image - x_t) / max(1 - t, 0.1).
        canvas_tokens: `num_tokens` of the tokenizer: all tokens up to the end of the window paint a small image, which
            the network reads beside x_t, and which an "image" prediction only corrects. None has no such image.
        canvas_side: side of that small image in pixels.
        canvas_rank: rank of the map by which a token paints.
        init_gate: initial gates of all blocks; 0 starts every block as the identity.
        modulation_std: standard deviation of the initial weights that turn time and tokens into modulation; 0 starts
            with tokens that change nothing.

    Raises UserError for arguments that do not fit each other.

    >>> decoder = FlowDecoder(patch_size=2, width=8, num_layers=1, condition_width=6, head_width=4)
    >>> decoder(torch.randn(2, 3, 4, 6), torch.tensor([0.0, 0.5]), torch.randn(2, 5, 6)).shape
    torch.Size([2, 3, 4, 6])
    """

    @records_arguments
    def __init__(
        self,
        *,
        patch_size: int = 8,
        width: int = 768,
        num_layers: int = 12,
        condition_width: int = 768,
        head_width: int = 64,
        rotary_base: float = 10_000.0,
        shared_time_embedding: bool = False,
        adaptive_head: bool = False,
        position_table: int | None = None,
        prediction: Literal["velocity", "image"] = "velocity",
        canvas_tokens: int | None = None,
        canvas_side: int = 16,
        canvas_rank: int = 16,
        init_gate: float = 0.0,
        modulation_std: float = 0.0,
    ):
        super().__init__()
        if adaptive_head and not shared_time_embedding:
            raise UserError("adaptive_head needs the time embedding that all blocks share. Set shared_time_embedding.")
        if prediction not in ("velocity", "image"):
            raise UserError(f"prediction must be velocity or image, got {prediction!r}. Pick one of the two.")
        if width % 2:
            raise UserError(f"width must be even (cosines and sines of the time), got {width}.")
        channels, canvas = 3 * patch_size**2, {"side": canvas_side, "rank": canvas_rank}
        self.condition_embedding = nn.Linear(condition_width, width)
        self.patch_embedding = nn.Linear(channels, width)
        self.position = None if position_table is None else nn.Parameter(torch.empty(position_table**2, width))
        self.canvas = None if canvas_tokens is None else TokenCanvas(canvas_tokens, condition_width, **canvas)
        self.canvas_embedding = None if canvas_tokens is None else nn.Linear(channels, width)
        self.time_embedding = FeedForward(width, width, activation=F.silu) if shared_time_embedding else None
        self.blocks = nn.ModuleList(
            FlowBlock(width, head_width, own_time=not shared_time_embedding) for _ in range(num_layers)
        )
        self.head_modulation = nn.Linear(width, 2 * width) if adaptive_head else None
        self.head = nn.Linear(width, channels)
        if self.device.type != "meta":
            self._init_weights(init_gate, modulation_std)

    def embed_times(self, t: Float[Tensor, " n"]) -> TimeEmbeddings:
        """Embeddings of shifted times (0 = noise, 1 = image), fp32 under any autocast."""
        with torch.autocast(self.device.type, enabled=False):
            t = t.to(self.device).float()
            waves = time_waves(t, self.config["width"])
            if self.time_embedding is not None:
                embedded = self.time_embedding(waves.to(self.dtype)).float()
                head = None if self.head_modulation is None else embedded
                return TimeEmbeddings(t, (embedded,) * len(self.blocks), head)
            own = (cast(FeedForward, block.time_embedding) for block in cast("Iterable[FlowBlock]", self.blocks))
            return TimeEmbeddings(t, tuple(embedding(waves.to(self.dtype)).float() for embedding in own))

    def attend_to(self, condition: Float[Tensor, "b seen condition_width"]) -> tuple[KeysValues, ...]:
        """Keys and values of one token group for every block: computed once, however many steps it drives."""
        c = plain_norm(self.condition_embedding(condition.to(self.condition_embedding.weight.dtype)))
        return tuple(block.keys_values(c) for block in cast("Iterable[FlowBlock]", self.blocks))

    def paint(self, condition: Float[Tensor, "b n condition_width"], first: int) -> Painted | None:
        """What the tokens from number `first` on add to the canvas, each apart; None for a decoder without one."""
        return None if self.canvas is None else self.canvas(condition.to(self.dtype), first)

    def forward(
        self,
        x_t: Images,
        t: Float[Tensor, " b"],
        condition: Float[Tensor, "b seen condition_width"],
        canvas: Canvas | None = None,
    ) -> Images:
        """Velocity (image - noise, both in the scale of x_t) at shifted time t in [0, 1], one per image.

        Args:
            x_t: t * data_std * image + (1 - t) * noise, of any sides that the patch divides.
            condition: rows of `DiffusionTokenizer.condition`: the window of tokens that drives this time.
            canvas: sum of what `paint` returned for all tokens up to the end of the window; None for decoders without
                `canvas_tokens`.

        Raises UserError where a side is no multiple of the patch, or has another size than the learned positions.
        """
        return self.velocity(x_t, self.embed_times(t), self.attend_to(condition), canvas)

    def velocity(
        self, x_t: Images, times: TimeEmbeddings, keys: tuple[KeysValues, ...], canvas: Canvas | None = None
    ) -> Images:
        """`forward` from what was computed ahead; `times` holds one row per image, or one for all."""
        return self.velocity_and_features(x_t, times, keys, canvas, layer=0)[0]

    def velocity_and_features(
        self,
        x_t: Images,
        times: TimeEmbeddings,
        keys: tuple[KeysValues, ...],
        canvas: Canvas | None = None,
        *,
        layer: int,
    ) -> tuple[Images, Float[Tensor, "b width rows columns"]]:
        """`velocity`, and the state after the first `layer` blocks (0..num_layers), to compare with other features."""
        if not 0 <= layer <= len(self.blocks):
            raise UserError(f"layer must lie in 0..{len(self.blocks)} (the blocks of the decoder), got {layer}.")
        if (canvas is None) != (self.canvas is None):
            raise UserError(
                f"a canvas goes with canvas_tokens, got {'none' if canvas is None else 'one'} with canvas_tokens "
                f"{self.config.canvas_tokens}. Pass the sum of what `paint` returns, which may be None."
            )
        self.check_sides(*x_t.shape[2:])
        rows, columns = (side // self.config.patch_size for side in x_t.shape[2:])
        rotary = grid_rotary_table(rows, columns, self.config.head_width, self.config.rotary_base, device=x_t.device)
        shown = None if canvas is None else shown_at(canvas, *x_t.shape[2:])
        x = self.patch_embedding(self._patches(x_t))
        if shown is not None:
            x = x + cast(nn.Linear, self.canvas_embedding)(self._patches(shown))
        if self.position is not None:
            x = x + self.position
        tapped = x
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, times.blocks[i], keys[i], rotary)
            if i + 1 == layer:
                tapped = x
        features = tapped.transpose(1, 2).unflatten(2, (rows, columns))
        return self._pixels(x, x_t, times, rows, shown), features

    def _patches(self, images: Images) -> Float[Tensor, "b l channels"]:
        patches = F.pixel_unshuffle(images, self.config["patch_size"]).flatten(2).transpose(1, 2)
        return patches.to(self.patch_embedding.weight.dtype)

    def _pixels(self, x: Rows, x_t: Images, times: TimeEmbeddings, rows: int, shown: Images | None) -> Images:
        x = plain_norm(x)
        if self.head_modulation is not None:
            assert times.head is not None  # made by embed_times of a decoder with an adaptive head
            signal = F.silu(times.head).to(self.head_modulation.weight.dtype).unsqueeze(1)
            shift, scale = self.head_modulation(signal).chunk(2, dim=-1)
            x = torch.addcmul(shift, x, 1 + scale)
        patches = self.head(x).transpose(1, 2).unflatten(2, (rows, -1))
        predicted = F.pixel_shuffle(patches, self.config["patch_size"])
        if self.config["prediction"] == "velocity":
            return predicted
        if shown is not None:
            predicted = predicted + shown
        # fp32: near t = 1 the difference is small and its divisor too
        return velocity_towards(predicted.float(), x_t.float(), times.t)

    def _init_weights(self, init_gate: float, modulation_std: float) -> None:
        """Spec of D-AR, 1.5: linear layers of blocks from a truncated normal, modulation and head zero."""
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)
        for block in cast("Iterable[FlowBlock]", self.blocks):
            init_linear_layers(block)
            _init_modulation(block.modulation, modulation_std)
            with torch.no_grad():
                # shift, scale, gate of the attention, then of the feed-forward
                block.modulation.bias.view(6, -1)[[2, 5]] = init_gate
        if self.head_modulation is not None:
            _init_modulation(self.head_modulation, modulation_std)
        if self.canvas is not None:
            self.canvas.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def check_sides(self, height: int, width: int) -> None:
        """Raise UserError where images of these sides, in pixels, cannot be made."""
        check_sides(height, width, self.config.patch_size, self.config.position_table)


def _init_modulation(linear: nn.Linear, std: float) -> None:
    if std:
        nn.init.trunc_normal_(linear.weight, std=std)
    else:
        nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
