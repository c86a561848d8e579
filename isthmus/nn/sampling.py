"""From logits to tokens: guidance, filters and draws, as pure functions that never modify their input."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError


def guided_logits(cond: Float[Tensor, "b l v"], uncond: Float[Tensor, "b l v"], scale: float) -> Float[Tensor, "b l v"]:
    """Classifier-free guidance: uncond + scale * (cond - uncond). scale = 1 returns cond."""
    return cond if scale == 1 else torch.lerp(uncond, cond, scale)


def check_filters(*, top_k: int | None, top_p: float | None, temperature: float, codebook_size: int) -> None:
    """Raise UserError unless `top_k` is in 1..codebook_size, `top_p` in (0, 1], `temperature` positive and finite."""
    if top_k is not None and not 1 <= top_k <= codebook_size:
        raise UserError(
            f"top_k must be 1..{codebook_size} (the codebook size), got {top_k}. Leave it out to turn it off."
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], got {top_p}. Leave it out to turn it off.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature must be positive and finite, got {temperature}. Use top_k=1 for greedy tokens.")


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
    size = logits.shape[-1]
    sort_width = size
    if top_k is not None and top_k < size:
        largest = logits.topk(top_k, dim=-1, sorted=False).values
        threshold = largest.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
        # Picking out few values beats sorting all; many do not, and on a GPU asking for their number would wait for it.
        if logits.device.type == "cpu" and 2 * top_k <= size:
            # ties at the threshold survive, so the widest row decides how many values have to be sorted
            sort_width = int(torch.isfinite(logits).sum(dim=-1).max())
    if top_p is not None and top_p < 1:
        logits = _nucleus(logits, top_p, sort_width)
    return logits


def _nucleus(logits: Float[Tensor, "... v"], top_p: float, sort_width: int) -> Float[Tensor, "... v"]:
    if sort_width < logits.shape[-1]:
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

    No synchronisation with the host, and a row depends on its own logits and number only. Codes with probability 0
    are never drawn.

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
    """Weights over codes for smooth sampling: softmax((logits (1 + r) + gumbel) / tau(r)) (VAR, `more_smooth`).

    `filtered_logits` may hold -inf; those codes get weight 0.
    """
    noisy = filtered_logits * (1 + ratio) + gumbels.to(filtered_logits.device)
    return (noisy / smooth_temperature(ratio)).softmax(dim=-1)


def nats_to_bits(nats: float) -> float:
    """Bits of a number of nats.

    >>> round(nats_to_bits(math.log(2)), 12)
    1.0
    """
    return nats / math.log(2)
