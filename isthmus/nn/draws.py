"""Random numbers as pure functions of (seed, path): the same draw whatever the batch, the order or the process.

Nothing in Isthmus reads a global random state. Every random choice names its purpose and its place, and gets a
stream of its own (numpy's Philox counter generator keyed through SeedSequence, both stable across platforms).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Purposes: the first entry of a path, so that two uses of one seed never share numbers.
AUGMENT = 1
ORDER = 2
LABEL_DROP = 3
SCALE_SUBSET = 4
DROP_PATH = 5
IMAGE = 6
REVIVE = 7
KMEANS = 8
SPLIT = 9
SMOOTH = 10
NOISE = 11
FLOW_TIME = 12
EMBEDDING_DROPOUT = 13
RESIDUAL_DROPOUT = 14
HIDDEN_TOKENS = 15
CAPTION = 16
EDIT = 17
SMOOTH_EDIT = 18
CLASSIFY = 20
ROLLOUT = 30


def stream(seed: int, *path: int) -> np.random.Generator:
    """The generator that belongs to `seed` (>= 0) and `path` (non-negative integers, the purpose first)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy=seed, spawn_key=path)))


def weight_seed(seed: int) -> int:
    """The 32-bit seed of a network's first weights, which torch and numpy draw from their global generators."""
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


class TokenStreams(NamedTuple):
    """Purposes of the numbers that draw tokens (`uniforms`) and of the noise per code for `smooth=True` (`gumbels`)."""

    uniforms: int
    gumbels: int


DRAW_STREAMS = TokenStreams(IMAGE, SMOOTH)
"""Images drawn from nothing."""
EDIT_STREAMS = TokenStreams(EDIT, SMOOTH_EDIT)
"""Edits: the numbers of draws would fill a hole in image i of a seed with what made image i."""


def token_uniforms(
    image_seeds: Sequence[tuple[int, int]], scale: int, num_tokens: int, *, round_index: int = 0, purpose: int = IMAGE
) -> Float[Tensor, "b l"]:
    """One number in [0, 1) per token, on the CPU: a row follows from its (seed, image index), scale and round alone."""
    rows = [stream(seed, purpose, index, scale, round_index).random(num_tokens) for seed, index in image_seeds]
    return torch.from_numpy(np.stack(rows)).float().clamp_(max=1 - 2**-24)


def token_gumbels(
    image_seeds: Sequence[tuple[int, int]],
    scale: int,
    num_tokens: int,
    codebook_size: int,
    *,
    round_index: int = 0,
    purpose: int = SMOOTH,
) -> Float[Tensor, "b l v"]:
    """Gumbel noise per token and code, for `smooth=True`; rows as in `token_uniforms`."""
    shape = (num_tokens, codebook_size)
    # round 0 is the path without a round, as it was before there were rounds
    place = (scale, round_index) if round_index else (scale,)
    rows = [stream(seed, purpose, index, *place).gumbel(size=shape) for seed, index in image_seeds]
    return torch.from_numpy(np.stack(rows)).float()
