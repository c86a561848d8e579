"""Ways to compute attention over a pyramid of scales: those the library uses, and those it was measured against."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.nn.attention import Attend, causal_attention, markov_attention, scale_causal_mask


def variants(lengths: Sequence[int]) -> dict[str, dict[str, Attend]]:
    """By kind and name; all of a kind compute the same, and the dense mask is what the others are compared with."""
    seen = scale_causal_mask(lengths)
    own = seen & seen.T
    return {
        "causal": {
            "dense mask": masked(seen),
            "softmax written out": written_out(seen),
            "a loop over prefixes": grouped_causal(lengths, seen, limit=0),
            "**small scales under one mask (default)**": causal_attention(lengths),
            "up to 200 tokens under one mask": grouped_causal(lengths, seen, limit=200),
        },
        "markov": {
            "dense mask": masked(own),
            "softmax written out": written_out(own),
            "a loop by slices": sliced(lengths),
            "**a loop by one split (default)**": markov_attention(lengths),
            "small scales under one mask": grouped_markov(lengths, own, limit=64),
        },
    }


def masked(visible: Tensor) -> Attend:
    return lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def written_out(visible: Tensor) -> Attend:
    hidden = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    return lambda q, k, v, scale: ((q * scale) @ k.transpose(-1, -2) + hidden).softmax(dim=-1) @ v


def sliced(lengths: Sequence[int]) -> Attend:
    ends = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    parts = [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        own = ((x[:, :, part] for x in (q, k, v)) for part in parts)
        return torch.cat([F.scaled_dot_product_attention(*three, scale=scale) for three in own], dim=2)

    return attend


def grouped_causal(lengths: Sequence[int], seen: Tensor, *, limit: int) -> Attend:
    count = max(1, sum(sum(lengths[: k + 1]) <= limit for k in range(len(lengths))))
    cuts = [sum(lengths[:count]), *lengths[count:]]
    ends = [sum(cuts[: k + 1]) for k in range(len(cuts))]

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outputs = []
        for rows, end in zip(q.split(cuts, dim=2), ends, strict=True):
            mask = seen[:end, :end] if end == cuts[0] and count > 1 else None
            outputs.append(F.scaled_dot_product_attention(rows, k[:, :, :end], v[:, :, :end], mask, scale=scale))
        return torch.cat([part.transpose(1, 2) for part in outputs], dim=1).transpose(1, 2)

    return attend


def grouped_markov(lengths: Sequence[int], own: Tensor, *, limit: int) -> Attend:
    count = max(k for k in range(1, len(lengths)) if sum(lengths[:k]) <= limit)
    cuts = [sum(lengths[:count]), *lengths[count:]]
    masks = [own[: cuts[0], : cuts[0]], *[None] * (len(cuts) - 1)]

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        parts = zip(*(x.transpose(1, 2).split(cuts, dim=1) for x in (q, k, v)), masks, strict=True)
        outputs = [
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in three), attn_mask=mask, scale=scale)
            for *three, mask in parts
        ]
        return torch.cat([x.transpose(1, 2) for x in outputs], dim=1).transpose(1, 2)

    return attend
