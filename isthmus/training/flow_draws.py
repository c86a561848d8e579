"""Noise and noise levels of a training batch: pure functions of (seed, position), whatever the batch or the process."""

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.draws import FLOW_TIME, NOISE, stream

_UNIFORM, _BALANCED = 0, 1


def raw_times(
    positions: Int[Tensor, " b"],
    num_levels: int,
    *,
    kind: Literal["uniform", "balanced"],
    num_groups: int,
    latest: float = 1.0,
    seed: int,
) -> Float[Tensor, "b k"]:
    """Raw times of training positions, in fp32.

    uniform: over [0, latest). A group answers for the times nearest to its own (g / G), so the first of G groups gets
    half a share and the last one and a half (spec of D-AR, 1.6).
    balanced: any G noise levels in a row, beginning at a multiple of G, visit every group once, in random order; within
    its group's times a level is uniform.

    Raises:
        UserError: balanced, and `latest` leaves the last group nothing.
    """
    numbers = [int(position) for position in positions]
    if kind == "uniform":
        rows = [latest * stream(seed, FLOW_TIME, _UNIFORM, number).random(num_levels) for number in numbers]
        return torch.from_numpy(np.stack(rows)).float()
    spans = group_spans(num_groups, latest)
    orders: dict[int, np.ndarray] = {}
    times = np.empty((len(numbers), num_levels))
    for row, number in enumerate(numbers):
        shares = stream(seed, FLOW_TIME, _UNIFORM, number).random(num_levels)
        for level, share in enumerate(shares):
            block, place = divmod(number * num_levels + level, num_groups)
            if block not in orders:
                orders[block] = stream(seed, FLOW_TIME, _BALANCED, block).permutation(num_groups)
            low, high = spans[orders[block][place]]
            times[row, level] = low + (high - low) * share
    return torch.from_numpy(times).float()


def group_spans(num_groups: int, latest: float = 1.0) -> list[tuple[float, float]]:
    """Raw times [low, high) that each group answers for: those that round to it, up to `latest`.

    >>> group_spans(4)
    [(0.0, 0.125), (0.125, 0.375), (0.375, 0.625), (0.625, 1.0)]

    Raises:
        UserError: `latest` leaves the last group nothing.
    """
    edges = [0.0, *((g + 0.5) / num_groups for g in range(num_groups - 1)), latest]
    if edges[-2] >= latest:
        raise UserError(
            f"loss.latest_time must be more than {edges[-2]:.4g}, where the last of {num_groups} groups begins, got "
            f"{latest}. Raise it, or draw the times uniformly."
        )
    return list(pairwise(edges))


def training_noise(
    positions: Int[Tensor, " b"],
    num_levels: int,
    image_shape: tuple[int, int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "b k 3 h w"]:
    """Standard normal noise of training positions, drawn on the device; a row depends on its own position only."""
    generator = torch.Generator(device)
    rows = []
    for position in positions:
        generator.manual_seed(int(stream(seed, NOISE, int(position)).integers(2**63)))
        rows.append(torch.randn(num_levels, 3, *image_shape, generator=generator, device=device))
    return torch.stack(rows)
