"""Attention with normalised queries and keys and rotary positions: the leaves of D-AR's blocks, and their norms.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1; Su et al., "RoFormer: Enhanced
Transformer with Rotary Position Embedding", section 3.2. Pairs of channels (2j, 2j + 1) turn together.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from isthmus.errors import UserError
from isthmus.nn.attention import Attend, Heads, prefix_causal_mask
from isthmus.nn.rotary import RotaryTable, rotary_table, rotate

Rows = Float[Tensor, "b l width"]
Seen = Float[Tensor, "b heads seen c"]
NORM_EPS = 1e-6


def llama_angles(positions: Int[Tensor, " l"], width: int, base: float) -> Float[Tensor, "l pairs"]:
    """The same angles as transformers' Llama has them: frequencies base^(-2j / width) rounded to fp32 first."""
    exponents = torch.arange(0, width, 2, device=positions.device).float() / width
    return positions.float()[:, None] * (1.0 / base**exponents)


def grid_rotary_table(
    rows: int, columns: int, width: int, base: float = 10_000.0, *, device: torch.device | None = None
) -> RotaryTable:
    """Table of a grid, row by row: the first half of the pairs turns with the row, the second with the column."""
    row, column = (
        rotary_table(torch.arange(side, device=device, dtype=torch.float32), width // 2, base)
        for side in (rows, columns)
    )
    halves = [row[:, None].expand(-1, columns, -1, -1), column[None].expand(rows, -1, -1, -1)]
    return torch.cat(halves, dim=2).flatten(0, 1)


def with_unrotated(table: RotaryTable, count: int) -> Float[Tensor, "longer pairs 2"]:
    """The table followed by `count` tokens without a position (the identity)."""
    identity = torch.tensor([1.0, 0.0], device=table.device, dtype=torch.float32).expand(count, table.shape[1], 2)
    return torch.cat([table, identity])


def plain_norm(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """LayerNorm over the last axis, without parameters of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def init_linear_layers(block: nn.Module) -> None:
    """Weights of the linear layers inside from a normal of 0.02, cut at +-2; biases zero."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation without parameters; in training its statistics are those of all processes' rows together.

    torch's own `SyncBatchNorm` does the same on GPUs alone. Two processes must see what one would.
    """

    def __init__(self, width: int):
        super().__init__(width, affine=False)

    def forward(self, input: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Rows with mean 0 and variance 1 per channel."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        count = all_reduce(input.new_tensor(float(len(input))))
        # two passes: a variance from sums of squares loses its digits where the mean is large
        mean = all_reduce(input.sum(dim=0)) / count
        variance = all_reduce((input - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum or 0.0)
        return (input - mean) * (variance + self.eps).rsqrt()


def full_attention(q: Heads, k: Seen, v: Seen, softmax_scale: float) -> Heads:
    """Every query sees every key."""
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale)


def token_causal_attention(q: Heads, k: Heads, v: Heads, softmax_scale: float) -> Heads:
    """Every token sees itself and all earlier ones."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)


def context_causal_attention(context: int) -> Attend:
    """The first `context` tokens see each other; a later token sees them, itself and the later ones before it."""

    def attend(q: Heads, k: Heads, v: Heads, softmax_scale: float) -> Heads:
        (first, later), own = q.split([context, q.shape[2] - context], dim=2), slice(context)
        mask = prefix_causal_mask(later.shape[2], k.shape[2], q.device)
        seen_by_first = full_attention(first, k[:, :, own], v[:, :, own], softmax_scale)
        seen_by_later = F.scaled_dot_product_attention(later, k, v, attn_mask=mask, scale=softmax_scale)
        return torch.cat([seen_by_first, seen_by_later], dim=2)

    return attend


class RotarySelfAttention(nn.Module):
    """Projections around an attention that the caller passes in; queries and keys are normalised over the head."""

    def __init__(self, width: int, head_width: int = 64):
        super().__init__()
        self.head_width = check_head_width(width, head_width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(head_width, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(head_width, eps=NORM_EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Rows, rotary: RotaryTable | None, attend: Attend) -> Rows:
        """Mix the tokens with `attend(q, k, v, softmax_scale)`; `rotary` turns queries and keys, None neither."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_width)).unbind(2)
        q, k = (_placed(norm(t), rotary, v.dtype) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        mixed = attend(q, k, v.transpose(1, 2), 1 / math.sqrt(self.head_width))
        return self.proj(mixed.transpose(1, 2).flatten(2))


class RotaryCrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another of the same width; only the queries have a position."""

    def __init__(self, width: int, head_width: int = 64):
        super().__init__()
        self.head_width = check_head_width(width, head_width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = nn.LayerNorm(head_width, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(head_width, eps=NORM_EPS)
        self.proj = nn.Linear(width, width)

    def keys_values(self, context: Float[Tensor, "b seen width"]) -> tuple[Seen, Seen]:
        """Keys (normalised) and values of the sequence that is looked at."""
        k, v = self.kv(context).unflatten(-1, (2, -1, self.head_width)).unbind(2)
        return _placed(self.k_norm(k), None, v.dtype), v.transpose(1, 2)

    def forward(self, x: Rows, keys_values: tuple[Seen, Seen], rotary: RotaryTable | None) -> Rows:
        """Mix what `keys_values` returned into the rows of `x`; `rotary` turns the queries."""
        keys, values = keys_values
        q = _placed(self.q_norm(self.q(x).unflatten(-1, (-1, self.head_width))), rotary, values.dtype)
        mixed = full_attention(q, keys, values, 1 / math.sqrt(self.head_width))
        return self.proj(mixed.transpose(1, 2).flatten(2))


def check_head_width(width: int, head_width: int) -> int:
    """`head_width`; UserError unless it divides `width` and is a multiple of 4."""
    if head_width <= 0 or width % head_width or head_width % 4:
        raise UserError(
            f"width must be a multiple of head_width, and head_width of 4 (rotary pairs for two axes), got width "
            f"{width} and head_width {head_width}. Change one of them."
        )
    return head_width


def check_sides(height: int, width: int, patch: int, table: int | None) -> None:
    """Raise UserError unless images of these sides, in pixels, fall into patches: table x table, unless None."""
    if min(height, width) < 1 or height % patch or width % patch:
        raise UserError(
            f"height and width must be multiples of {patch} (patch_size), got {height} x {width}. Resize them, or ask "
            "for another size."
        )
    if table is not None and (height, width) != (table * patch, table * patch):
        raise UserError(
            f"images must be {table * patch} x {table * patch} (there is a learned position for every patch), got "
            f"{height} x {width}. Resize them, or ask for no other size."
        )


def _placed(rows: Float[Tensor, "b l heads c"], rotary: RotaryTable | None, dtype: torch.dtype) -> Heads:
    """Heads first, turned by their position, in the type of the values (norms are fp32 under autocast)."""
    heads = rows.transpose(1, 2)
    return (heads if rotary is None else rotate(heads, rotary)).to(dtype)
