"""Keeping the diffusion tokenizer's codebook alive: where it starts from, and what becomes of codes nothing uses.

As in the first family (`isthmus.training.codebook`), but there is one latent per token and all have unit length.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.draws import REVIVE, stream
from isthmus.functional.shapes import Images
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.training.k_means import k_means


def codebook_weight(model: DiffusionTokenizer) -> Tensor:
    """The raw codes. Raises `UserError` for a tokenizer without a codebook."""
    if model.codebook is None:
        raise UserError("this tokenizer keeps its tokens continuous (model.quantized False): it has no codes.")
    return model.codebook.weight


@torch.no_grad()
def initialize_unit_codebook(model: DiffusionTokenizer, images: Images, *, seed: int) -> None:
    """Start the codebook from the encoder's outputs on `images`: k-means, brought back to unit length."""
    weight = codebook_weight(model)
    was_training = model.training
    # running statistics, and none are changed
    model.eval()
    latents = torch.cat([model.latents(part).flatten(0, 1) for part in images.split(64)])
    model.train(was_training)
    weight.copy_(F.normalize(k_means(latents, len(weight), seed=seed), dim=-1))


@torch.no_grad()
def revive_unit_codes(
    model: DiffusionTokenizer, dead: Bool[Tensor, " k"], latents: Float[Tensor, "b n d"], *, seed: int, step: int
) -> int:
    """Move codes that no group uses onto latents of the present batch; returns how many moved."""
    count = int(dead.sum())
    if count:
        rows = latents.flatten(0, 1)
        # without replacement: two codes on one latent would stay together
        order = torch.from_numpy(stream(seed, REVIVE, step).permutation(len(rows))).to(rows.device)
        chosen = order[torch.arange(count, device=rows.device) % len(rows)]
        weight = codebook_weight(model)
        weight[dead] = rows[chosen].to(weight)
    return count
