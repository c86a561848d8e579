"""The objective of next-scale priors: cross-entropy of every token, weighted over scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.functional.draws import DROP_PATH, LABEL_DROP, SCALE_SUBSET, stream
from isthmus.functional.pyramid import ScaleSchedule


def scale_weights(kind: Literal["token-uniform", "lognormal"], scale_sizes: Sequence[int]) -> tuple[float, ...]:
    """Weight of the mean loss of each scale; they add up to 1.

    token-uniform: every token counts the same, so scale k weighs s_k^2 / L and the last scale most (VAR).
    lognormal: a normal density over the standardised sides in reverse order (spec of SRDD, 6): most weight on the
    middle scales.

    >>> [round(w, 3) for w in scale_weights("token-uniform", (1, 2, 4))]
    [0.048, 0.19, 0.762]
    """
    sizes = np.array(scale_sizes, dtype=np.float64)
    if kind == "token-uniform" or len(sizes) == 1:
        weights = sizes**2
    else:
        relative = sizes / sizes[-1]
        standardised = (relative[::-1] - relative.mean()) / relative.std(ddof=1)
        weights = np.exp(-(standardised**2) / 2)
    return tuple(float(w) for w in weights / weights.sum())


@dataclass
class PriorLosses:
    """What one batch gave.

    Attributes:
        total: what is minimised.
        by_scale: mean cross-entropy of each scale that was run, nats per token.
        scales: which scales those are.
        logits: (b, l, v), for measurements.
        counted: (b, l), tokens that the loss is on; None where it is on all.
    """

    total: Float[Tensor, ""]
    by_scale: Float[Tensor, " scales"]
    scales: tuple[int, ...]
    logits: Float[Tensor, "b l v"]
    counted: Bool[Tensor, "b l"] | None = None


def next_scale_loss(
    logits: Float[Tensor, "b l v"],
    token_ids: Int[Tensor, "b l"],
    schedule: ScaleSchedule,
    weights: Sequence[float],
    *,
    scales: Sequence[int],
    label_smoothing: float = 0.0,
    counted: Bool[Tensor, "b l"] | None = None,
) -> PriorLosses:
    """Weighted cross-entropy over `scales`; `logits` and `token_ids` hold their tokens only.

    With a random subset of the scales the sum is scaled by all / run, so that its mean over subsets is the full loss.
    Where only some tokens are `counted` (at least one per image and scale), a scale's loss is their mean per image.
    """
    # rows of logits, as they lie: a class axis in the middle would be laid out anew, twice as slow on a CPU
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), token_ids.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(token_ids)
    lengths = [schedule.lengths[k] for k in scales]
    if counted is not None:
        parts = zip(losses.split(lengths, dim=1), counted.split(lengths, dim=1), strict=True)
        by_scale = torch.stack([((part * own).sum(dim=1) / own.sum(dim=1)).mean() for part, own in parts])
    else:
        by_scale = torch.stack([part.mean() for part in losses.split(lengths, dim=1)])
    chosen = by_scale.new_tensor([weights[k] for k in scales])
    total = (chosen * by_scale).sum() * (schedule.num_scales / len(scales))
    return PriorLosses(total, by_scale.detach(), tuple(scales), logits.detach(), counted)


def dropped_labels(
    labels: Int[Tensor, " b"], positions: Int[Tensor, " b"], *, rate: float, null_class_id: int, seed: int
) -> Int[Tensor, " b"]:
    """Labels with a share `rate` replaced by the null label; decided per training position."""
    coins = [stream(seed, LABEL_DROP, int(position)).random() for position in positions]
    dropped = torch.tensor(coins, dtype=torch.float64, device=labels.device) < rate
    return torch.where(dropped, null_class_id, labels)


def path_factors(
    positions: Int[Tensor, " b"], rates: Sequence[float], *, seed: int
) -> Float[Tensor, "b layers 2"] | None:
    """Stochastic depth: 0 or 1 / (1 - rate) per image, block and branch, decided per training position."""
    if not any(rates):
        return None
    rate = np.array(rates)[:, None]
    rows = [
        (stream(seed, DROP_PATH, int(position)).random((len(rates), 2)) >= rate) / (1 - rate) for position in positions
    ]
    return torch.from_numpy(np.stack(rows)).float()


def scale_subset(num_scales: int, count: int | None, *, seed: int, step: int) -> tuple[int, ...]:
    """Which scales this step runs: all, or `count` drawn without replacement, the same in every process."""
    if count is None or count >= num_scales:
        return tuple(range(num_scales))
    return tuple(sorted(int(k) for k in stream(seed, SCALE_SUBSET, step).permutation(num_scales)[:count]))


def select_scales(rows: Tensor, schedule: ScaleSchedule, scales: Sequence[int], *, first: int = 0) -> Tensor:
    """Columns of `scales` out of a (b, tokens of scales `first`.., ...) tensor."""
    if len(scales) == schedule.num_scales:
        return rows
    parts = rows.split(list(schedule.lengths[first:]), dim=1)
    return torch.cat([parts[k - first] for k in scales if k >= first] or [rows[:, :0]], dim=1)
