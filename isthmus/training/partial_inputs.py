"""Training a prior for refinement: some inputs show a part of the scale's own tokens, the loss is on the rest.

Source: spec of SRDD, 3.2 (masked resampling); what a masked round of `ScaleRefinementScheduler` asks of a model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.functional.draws import HIDDEN_TOKENS, stream
from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.shapes import TokenPyramid
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE


@dataclass
class PartlyShown:
    """What the inputs of a batch show of their own tokens.

    Attributes:
        counted: (b, L), True where a token is predicted: hidden, or of a scale that shows none of its own.
        marked: (b, L), True where a token is hidden beside others that are shown.
        shows: (b, scales), True where a scale shows tokens of its own.
    """

    counted: Bool[Tensor, "b l"]
    marked: Bool[Tensor, "b l"]
    shows: Bool[Tensor, "b scales"]


def partly_shown(
    positions: Int[Tensor, " b"], lengths: Sequence[int], *, probability: float, seed: int, one_scale: bool = False
) -> PartlyShown:
    """Which scales show tokens of their own, each with `probability`, and which of these stay hidden.

    The share that is hidden is uniform in (0, 1], at least one token. The first scale shows nothing. Decided per
    training position and scale, by (seed, position, scale).

    `one_scale` is for causal models: with `probability` an image shows tokens at one of its scales, each as likely.
    Where several did, a scale would be trained on the keys of many partial inputs, of which a draw holds none: it
    restores the ordinary keys after the rounds of a scale. Those of the one scale are still read by the later scales
    of that image, so these learn on them at times; they hold nothing that the features do not.
    """
    marked, shows = [], []
    for position in positions.tolist():
        rows, flags = [np.zeros(lengths[0], dtype=bool)], [False]
        chosen = _one_of(len(lengths), stream(seed, HIDDEN_TOKENS, position), probability) if one_scale else None
        for scale, length in enumerate(lengths[1:], start=1):
            random = stream(seed, HIDDEN_TOKENS, position, scale)
            shown = bool(random.random() < probability)
            if one_scale:
                shown = scale == chosen
            count = math.ceil((1 - random.random()) * length)
            hidden = np.zeros(length, dtype=bool)
            hidden[random.permutation(length)[:count]] = True
            rows.append(hidden & shown)
            flags.append(shown)
        marked.append(np.concatenate(rows))
        shows.append(flags)
    marks, flags = torch.from_numpy(np.stack(marked)), torch.tensor(shows)
    return PartlyShown(marks | ~flags.repeat_interleave(torch.tensor(lengths), dim=1), marks, flags)


def _one_of(num_scales: int, random: np.random.Generator, probability: float) -> int | None:
    """A scale from 1 on, with this probability; none otherwise, or where there is only the first."""
    if num_scales < 2 or random.random() >= probability:
        return None
    return int(random.integers(1, num_scales))


@torch.no_grad()
def partial_inputs(
    tokenizer: MultiScaleVQVAE, token_ids: TokenPyramid, drawn: PartlyShown, schedule: ScaleSchedule
) -> Float[Tensor, "b l d"]:
    """Teacher-forced inputs of scales 1..K-1, (b, L - s_0^2, d); those of scales that show tokens hold these too."""
    ordinary = tokenizer.scale_inputs(token_ids, schedule).split(list(schedule.lengths[1:]), dim=1)
    hidden = drawn.marked.to(token_ids[0].device).split(list(schedule.lengths), dim=1)
    shows = drawn.shows.to(token_ids[0].device)
    features = torch.zeros(
        len(shows), tokenizer.codebook.embedding_dim, schedule.grid, schedule.grid, device=shows.device
    )
    parts = [torch.zeros(len(shows), 0, tokenizer.codebook.embedding_dim, device=shows.device)]
    for scale, ids in enumerate(token_ids):
        codes = tokenizer.lookup(ids)
        if scale:
            # hidden first, then upsampled and through phi: no hidden token reaches an input
            partial = tokenizer.partial_scale_input(features, codes, hidden[scale], scale, schedule)
            parts.append(torch.where(shows[:, scale, None, None], partial, ordinary[scale - 1]))
        features = tokenizer.add_codes(features, codes, scale, schedule)
    return torch.cat(parts, dim=1)
