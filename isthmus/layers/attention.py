"""Attention over a pyramid of scales without a mask.

What a token may see is decided by how the sequence is cut, not by adding -inf: `markov` runs one attention per
scale, `causal` one attention per scale over its prefix. The cut is one `split`, whose backward is a single
concatenation; slices would each pad their gradient to the whole sequence.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Heads = Float[Tensor, "b heads l c"]
Attend = Callable[[Heads, Heads, Heads, float], Heads]

MAX_LOG_SCALE = math.log(100)


class MultiHeadAttention(nn.Module):
    """Projections around an attention that the caller passes in.

    Args:
        width: width in and out.
        num_heads: heads; each is width / num_heads wide.
        l2_attention: normalise queries and keys to unit length, and multiply queries by a learned factor per head
            (stored as a log, at most log 100). Otherwise the scores are scaled by 0.25 / sqrt(head width), as the
            published network without the normalisation does.
    """

    def __init__(self, width: int, num_heads: int, *, l2_attention: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4))) if l2_attention else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b l width"], attend: Attend) -> Float[Tensor, "b l width"]:
        """Mix the tokens with `attend(q, k, v, softmax_scale)`; keys have no bias."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.log_scale is None:
            softmax_scale = 0.25 / math.sqrt(q.shape[-1])
        else:
            softmax_scale = 1.0
            factor = self.log_scale.clamp(max=MAX_LOG_SCALE).exp().transpose(1, 2)  # (1, 1, heads, 1)
            # the factors are fp32, so the products are; attention wants one type
            q = (q * (factor * reciprocal_norm(q))).to(v.dtype)
            k = (k * reciprocal_norm(k)).to(v.dtype)
        mixed = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def reciprocal_norm(x: Float[Tensor, "*rows c"]) -> Float[Tensor, "*rows 1"]:
    """1 / |x| of every row, in fp32, with |x| taken to be at least 1e-12.

    x * reciprocal_norm(x) is `F.normalize(x)`, whose backward takes twice as many passes over memory.
    """
    return x.float().square().sum(dim=-1, keepdim=True).clamp(min=1e-24).rsqrt()


def markov_attention(lengths: Sequence[int]) -> Attend:
    """Every scale attends to itself alone: one unmasked attention per scale."""

    def attend(q: Heads, k: Heads, v: Heads, softmax_scale: float) -> Heads:
        parts = zip(*(_cut(x, lengths) for x in (q, k, v)), strict=True)
        return _join([F.scaled_dot_product_attention(*part, scale=softmax_scale) for part in parts])

    return attend


def causal_attention(lengths: Sequence[int], *, smallest_alone: int = 64) -> Attend:
    """Every scale attends to itself and to all earlier scales.

    The leading scales that hold at most `smallest_alone` tokens together share one small masked call; each later
    scale is one unmasked attention over its prefix.
    """
    grouped = _leading_group(lengths, smallest_alone)
    head = sum(lengths[:grouped])
    cuts = [head, *lengths[grouped:]]
    mask = scale_causal_mask(lengths[:grouped]) if grouped > 1 else None

    def attend(q: Heads, k: Heads, v: Heads, softmax_scale: float) -> Heads:
        outputs, seen = [], 0
        for index, queries in enumerate(_cut(q, cuts)):
            seen += cuts[index]
            whole = seen == k.shape[2]
            keys, values = (k, v) if whole else (k[:, :, :seen], v[:, :, :seen])
            visible = mask.to(q.device) if index == 0 and mask is not None else None
            outputs.append(
                F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=softmax_scale)
            )
        return _join(outputs)

    return attend


# Rows of projections lie token by token, (b, l, heads, c): cut and joined along l there, neither the parts nor their
# gradients have to be laid out anew.
def _cut(x: Heads, lengths: Sequence[int]) -> list[Float[Tensor, "b heads _ c"]]:
    return [part.transpose(1, 2) for part in x.transpose(1, 2).split(list(lengths), dim=1)]


def _join(parts: Sequence[Float[Tensor, "b heads _ c"]]) -> Heads:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _leading_group(lengths: Sequence[int], limit: int) -> int:
    count, tokens = 0, 0
    for length in lengths:
        if tokens + length > limit and count:
            break
        count, tokens = count + 1, tokens + length
    return count


def scale_causal_mask(lengths: Sequence[int]) -> Tensor:
    """(L, L) booleans, True where a token (row) sees a token (column): scale of the column <= scale of the row.

    >>> scale_causal_mask([1, 2]).int().tolist()
    [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    """
    scale = torch.cat([torch.full((length,), k) for k, length in enumerate(lengths)])
    return scale[:, None] >= scale[None, :]


def prefix_causal_mask(new: int, total: int, device: torch.device) -> Tensor:
    """(new, total) booleans of the last `new` of `total` tokens: True up to and including a token's own column.

    >>> prefix_causal_mask(2, 3, torch.device("cpu")).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)


class KeyValueCache:
    """Keys and values of the scales generated so far, allocated once; passed in by the caller, owned by no module.

    Args:
        num_layers, batch, num_heads, num_tokens, head_width: sizes of the two buffers.
        device, dtype: where and how they are stored.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        num_tokens: int,
        head_width: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (num_layers, batch, num_heads, num_tokens, head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` as stored, once every layer has seen them."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        self.length = min(self.length, length)

    def copy_of(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens start..end - 1, to put back after something else was tried there."""
        return self.keys[..., start:end, :].clone(), self.values[..., start:end, :].clone()

    def put_back(self, start: int, stored: tuple[Tensor, Tensor]) -> None:
        """Store what `copy_of` returned, from token `start` on; what lies behind it is forgotten."""
        keys, values = stored
        self.length = start + keys.shape[-2]
        self.keys[..., start : self.length, :], self.values[..., start : self.length, :] = keys, values

    def keep_rows(self, rows: Int[Tensor, " rows"]) -> None:
        """Forget all rows of the batch but these, which are numbered anew in their order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def attention(self, layer: int, *, causal: bool = False) -> Attend:
        """Attention of new tokens over everything stored and themselves; where `causal`, not over later new tokens.

        A batch smaller than the cache reads and writes its leading rows (guidance ended: the null rows behind them
        are no longer needed).
        """

        def attend(q: Heads, k: Heads, v: Heads, softmax_scale: float) -> Heads:
            rows, start, end = q.shape[0], self.length, self.length + q.shape[2]
            keys, values = self.keys[layer, :rows, :, :end], self.values[layer, :rows, :, :end]
            keys[:, :, start:] = k
            values[:, :, start:] = v
            mask = prefix_causal_mask(q.shape[2], end, q.device) if causal and q.shape[2] > 1 else None
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=softmax_scale)

        return attend
