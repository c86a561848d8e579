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
    """
    logits = transformer(class_labels, image_tokenizer.scale_inputs(token_ids, schedule).to(transformer.dtype)).logits
    dim, device = image_tokenizer.codebook.embedding_dim, token_ids[0].device
    features = torch.zeros(len(class_labels), dim, schedule.grid, schedule.grid, device=device)
    examples = []
    for scale, (ids, own) in enumerate(zip(token_ids, logits.split(list(schedule.lengths), dim=1), strict=True)):
        if scale:
            again, uniforms = _redrawn(positions, scale, ids.shape[1], seed)
            again = again.to(device)
            mixed = torch.where(again, draw_tokens(own, uniforms), ids)
            codes, measures = image_tokenizer.lookup(mixed), critic_measures(own, mixed)
            examples.append(CriticExample(scale, codes, features, measures, ~again))
        features = image_tokenizer.add_codes(features, image_tokenizer.lookup(ids), scale, schedule)
    return examples


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
