"""What a critic learns from: true tokens of an image with some of them drawn again by the model.

Source: spec of SRDD, 3.2, "critic".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.functional.draws import CRITIC, stream
from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.sampling import draw_tokens
from isthmus.functional.shapes import FeatureMap, LatentMap, TokenPyramid
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.models.token_critic import critic_measures
from isthmus.training.partial_inputs import PartlyShown, partial_inputs


@dataclass
class CriticExample:
    """One scale of a batch, as the critic sees it.

    Attributes:
        scale: its index, from 1.
        codes: (b, d, s, s), true and redrawn.
        features: (b, d, grid, grid), those of the true tokens before this scale.
        measures: (b, l, 3), see `critic_measures`.
        true: (b, l), False where the token was drawn again, even where the draw found the same code.
    """

    scale: int
    codes: FeatureMap
    features: LatentMap
    measures: Float[Tensor, "b l 3"]
    true: Bool[Tensor, "b l"]


@torch.no_grad()
def critic_examples(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " b"],
    positions: Sequence[int],
    *,
    seed: int,
    schedule: ScaleSchedule,
) -> list[CriticExample]:
    """Redraw a random share of every scale but the first, unguided and unfiltered, at temperature 1.

    Filtered or guided draws are likelier than true tokens, and a critic would learn that instead of what fits. The
    share is uniform in (0, 1); which tokens, and what is drawn, follows from (seed, position, scale).

    A model with a mark for hidden tokens (trained for refinement) draws them beside the tokens that stay, as a masked
    round does. Any other model has never seen an input that shows a part of its own scale: its redraws come from the
    ordinary prediction, as its first draw of a scale does, so the critic learns what independent draws get wrong and
    not what a foreign input does. The measures are those of the ordinary prediction in both cases, as they are in a
    round of `ScaleRefinementScheduler`.
    """
    device, dim, grid = token_ids[0].device, image_tokenizer.codebook.embedding_dim, schedule.grid
    inputs = image_tokenizer.scale_inputs(token_ids, schedule).to(transformer.dtype)
    ordinary = list(transformer(class_labels, inputs).logits.split(list(schedule.lengths), dim=1))
    chosen = [_redrawn(positions, scale, length, seed) for scale, length in enumerate(schedule.lengths)]
    again = [torch.zeros_like(chosen[0][0], device=device), *(hidden.to(device) for hidden, _ in chosen[1:])]
    drawn_from = ordinary
    if transformer.mask_embedding is not None:
        drawn_from = _beside_the_others(image_tokenizer, transformer, token_ids, class_labels, again, schedule)
    features, examples = torch.zeros(len(class_labels), dim, grid, grid, device=device), []
    for scale, ids in enumerate(token_ids):
        if scale:
            mixed = torch.where(again[scale], draw_tokens(drawn_from[scale], chosen[scale][1]), ids)
            codes, measures = image_tokenizer.lookup(mixed), critic_measures(ordinary[scale], mixed)
            examples.append(CriticExample(scale, codes, features, measures, ~again[scale]))
        features = image_tokenizer.add_codes(features, image_tokenizer.lookup(ids), scale, schedule)
    return examples


def _beside_the_others(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " b"],
    hidden: Sequence[Bool[Tensor, "b _"]],
    schedule: ScaleSchedule,
) -> list[Float[Tensor, "b _ v"]]:
    """Logits of every scale from inputs that show its own tokens but for the hidden ones; the first is the ordinary.

    Earlier scales are read as they are. A Markov model never reads them, so one pass does for all scales.
    """
    num_scales, first = schedule.num_scales, schedule.lengths[0]
    lengths = torch.tensor(schedule.lengths, device=token_ids[0].device)
    found: list[Tensor] = []
    for end in (num_scales,) if transformer.is_markov else range(1, num_scales + 1):
        start = 0 if transformer.is_markov else end - 1
        shows = torch.zeros(len(class_labels), num_scales, dtype=torch.bool, device=lengths.device)
        shows[:, max(start, 1) : end] = True
        marked = torch.cat(list(hidden), dim=1) & shows.repeat_interleave(lengths, dim=1)
        inputs = partial_inputs(image_tokenizer, token_ids, PartlyShown(marked, marked, shows), schedule)
        read = schedule.offsets[end] - first
        logits = transformer(
            class_labels, inputs[:, :read].to(transformer.dtype), scales=range(end), hidden=marked[:, first:][:, :read]
        ).logits
        found += logits.split(list(schedule.lengths[:end]), dim=1)[start:]
    return found


def _redrawn(
    positions: Sequence[int], scale: int, length: int, seed: int
) -> tuple[Bool[Tensor, "b l"], Float[Tensor, "b l"]]:
    """Which tokens are drawn again, and the uniform numbers for all of them."""
    chosen, uniforms = [], []
    for position in positions:
        random = stream(seed, CRITIC, position, scale)
        chosen.append(random.random(length) < random.random())
        uniforms.append(random.random(length))
    numbers = torch.from_numpy(np.stack(uniforms)).float().clamp_(max=1 - 2**-24)
    return torch.from_numpy(np.stack(chosen)), numbers
