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


def partly_shown(positions: Int[Tensor, " b"], lengths: Sequence[int], *, probability: float, seed: int) -> PartlyShown:
    """Which scales show tokens of their own, each with `probability`, and which of these stay hidden.

    The share that is hidden is uniform in (0, 1], at least one token. The first scale shows nothing. Decided per
    training position and scale, by (seed, position, scale).
    """
    marked, shows = [], []
    for position in positions.tolist():
        rows, flags = [np.zeros(lengths[0], dtype=bool)], [False]
        for scale, length in enumerate(lengths[1:], start=1):
            random = stream(seed, HIDDEN_TOKENS, position, scale)
            shown = bool(random.random() < probability)
            count = math.ceil((1 - random.random()) * length)
            hidden = np.zeros(length, dtype=bool)
            hidden[random.permutation(length)[:count]] = True
            rows.append(hidden & shown)
            flags.append(shown)
        marked.append(np.concatenate(rows))
        shows.append(flags)
    marks, flags = torch.from_numpy(np.stack(marked)), torch.tensor(shows)
    return PartlyShown(marks | ~flags.repeat_interleave(torch.tensor(lengths), dim=1), marks, flags)


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
