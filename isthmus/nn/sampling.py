"""From logits to tokens: guidance, filters and draws, as pure functions that never modify their input."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def guided_logits(cond: Float[Tensor, "b l v"], uncond: Float[Tensor, "b l v"], scale: float) -> Float[Tensor, "b l v"]:
    """Classifier-free guidance: uncond + scale * (cond - uncond). scale = 1 returns cond."""
    return cond if scale == 1 else torch.lerp(uncond, cond, scale)


def filter_logits(
    logits: Float[Tensor, "... v"], *, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "... v"]:
    """Top-k, then nucleus on what is left; removed entries are -inf. `None` turns a filter off.

    Top-k keeps every value tied with the k-th largest. The nucleus goes through the values from the smallest up and
    drops those whose cumulated probability is <= 1 - p; the largest always stays (spec of VAR, 2.7). With both on,
    the nucleus on a CPU sorts only the values that top-k kept; the result is the same.

    >>> filter_logits(torch.tensor([0.0, 2.0, 1.0]), top_k=2)
    tensor([-inf, 2., 1.])
    """
    size = sort_width = logits.shape[-1]
    if top_k is not None and top_k < size:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
        # Picking out few values beats sorting all; many do not, and on a GPU asking for their number would wait for it.
        if logits.device.type == "cpu" and 2 * top_k <= size:
            # ties at the threshold survive, so the widest row decides how many values have to be sorted
            sort_width = int(torch.isfinite(logits).sum(dim=-1).max())
    if top_p is None or top_p >= 1:
        return logits
    if sort_width < size:
        kept = logits.topk(sort_width, dim=-1, sorted=False).indices.sort(dim=-1).values
    else:
        kept = torch.arange(sort_width, device=logits.device).expand_as(logits)
    # stable over ascending indices: among equal values the lower index goes first, whatever the device or batch
    values, rank = logits.gather(-1, kept).sort(dim=-1, stable=True)
    order = kept.gather(-1, rank)
    dropped = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[..., -1] = False
    removed = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, dropped)
    return logits.masked_fill(removed, float("-inf"))


def draw_tokens(logits: Float[Tensor, "b l v"], uniforms: Float[Tensor, "b l"]) -> Int[Tensor, "b l"]:
    """Inverse CDF: the first code whose cumulated probability exceeds the token's uniform number.

    No synchronisation with the host, and a row depends on its own logits and number only.

    >>> draw_tokens(torch.log(torch.tensor([[[0.25, 0.75]]])), torch.tensor([[0.3]]))
    tensor([[1]])
    """
    cumulated = logits.float().softmax(dim=-1).cumsum(dim=-1)
    # scaled by the last entry: rounding must not leave a gap below 1 in which a filtered code would be drawn
    target = uniforms.to(cumulated.device).unsqueeze(-1) * cumulated[..., -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def smooth_temperature(ratio: float) -> float:
    """Gumbel temperature of smooth sampling at `ratio` = k / (K - 1) of the run: max(0.27 (1 - 0.95 r), 0.005)."""
    return max(0.27 * (1 - 0.95 * ratio), 0.005)


def smooth_weights(
    filtered_logits: Float[Tensor, "b l v"], gumbels: Float[Tensor, "b l v"], ratio: float
) -> Float[Tensor, "b l v"]:
    """Weights over codes for smooth sampling: softmax((logits (1 + r) + gumbel) / tau(r)) (VAR, `more_smooth`)."""
    noisy = filtered_logits * (1 + ratio) + gumbels.to(filtered_logits.device)
    return (noisy / smooth_temperature(ratio)).softmax(dim=-1)


def nats_to_bits(nats: float) -> float:
    """Bits of a number of nats."""
    return nats / math.log(2)
