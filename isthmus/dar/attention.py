"""Attention with normalised queries and keys and rotary positions: the leaves of D-AR's blocks.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1 (spec of D-AR, 1.1 and 1.5). Where tokens
lie (the rotary table) and what they may see (`attend`) are arguments, so that one leaf serves the encoder, the causal
stack and the pixel decoder.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.functional.rotary import RotaryTable, rotate
from isthmus.layers.attention import Attend, prefix_causal_mask
from isthmus.layers.norm import NORM_EPS

Rows = Float[Tensor, "b l width"]
Heads = Float[Tensor, "b heads l c"]
Seen = Float[Tensor, "b heads seen c"]


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
        parts = [
            F.scaled_dot_product_attention(first, k[:, :, own], v[:, :, own], scale=softmax_scale),
            F.scaled_dot_product_attention(later, k, v, attn_mask=mask, scale=softmax_scale),
        ]
        return torch.cat(parts, dim=2)

    return attend


class RotarySelfAttention(nn.Module):
    """Projections around an attention that the caller passes in; scores are scaled by 1 / sqrt(head width).

    Args:
        width: width in and out.
        head_width: width of a head; queries and keys are normalised over it, by one affine norm for all heads.

    Raises:
        UserError: `width` is not a multiple of `head_width`, or that is not a multiple of 4.
    """

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
    """Queries from one sequence, keys and values from another; only the queries have a position.

    The two halves are separate, because keys and values of a token group serve every solver step of that group.

    Args:
        width: width of both sequences.
        head_width: as in `RotarySelfAttention`.

    Raises:
        UserError: `width` is not a multiple of `head_width`, or that is not a multiple of 4.
    """

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
    """`head_width`, once it is known to fit.

    Raises:
        UserError: `width` is not a multiple of `head_width`, or that is not a multiple of 4.
    """
    if head_width <= 0 or width % head_width or head_width % 4:
        raise UserError(
            f"width must be a multiple of head_width, and head_width of 4 (rotary pairs for two axes), got width "
            f"{width} and head_width {head_width}. Change one of them."
        )
    return head_width


def _placed(rows: Float[Tensor, "b l heads c"], rotary: RotaryTable | None, dtype: torch.dtype) -> Heads:
    """Heads first, turned by their position, in the type of the values (norms are fp32 under autocast)."""
    heads = rows.transpose(1, 2)
    return (heads if rotary is None else rotate(heads, rotary)).to(dtype)
