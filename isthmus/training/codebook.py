"""Keeping a codebook alive: where it starts from, and what becomes of codes that nothing uses.

A codebook that starts at random before the encoder has learnt anything is used by a few codes only and stays so. Here
the encoder first trains without quantisation, the codebook then starts from what it puts out (k-means over all
scales), and codes that fall out of use are moved to residuals of current images.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isthmus.functional.draws import KMEANS, REVIVE, stream
from isthmus.functional.pyramid import area_downsample
from isthmus.functional.shapes import FeatureMap, Images, LatentMap, ScaleTokens
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.training.k_means import k_means


@torch.no_grad()
def residual_vectors(model: MultiScaleVQVAE, latents: LatentMap, *, exact: bool) -> list[Float[Tensor, "n d"]]:
    """What each scale has to code: its residuals, one tensor (b * s_k * s_k, d) per scale.

    `exact` follows a codebook without error (there is none yet); otherwise the present codebook's residuals.
    """
    collected: list[Tensor] = []

    def choose(scale: int, features: LatentMap) -> tuple[ScaleTokens, FeatureMap]:
        residual = area_downsample(latents - features, model.schedule.sizes[scale])
        collected.append(residual.permute(0, 2, 3, 1).flatten(0, 2))
        if exact:
            return torch.zeros(len(latents), residual.shape[-1] ** 2, dtype=torch.long), residual
        token_ids = searched[scale]
        return token_ids, model.lookup(token_ids)

    searched = [] if exact else model.requantize(latents)
    for _ in model.residual_scales(choose, latents):
        pass
    return collected


@torch.no_grad()
def initialize_codebook(model: MultiScaleVQVAE, images: Images, *, seed: int) -> None:
    """Start the codebook from the encoder's outputs on `images`: k-means over the residuals of all scales.

    Fine scales have most of the tokens; each scale enters with the square root of its share, so that the few coarse
    tokens, which decide about the whole image, get codes as well.
    """
    latents = torch.cat([model.latents(part) for part in images.split(64)]).float()
    per_scale = residual_vectors(model, latents, exact=True)
    weights = np.sqrt([len(rows) for rows in per_scale])
    budget = min(sum(len(rows) for rows in per_scale), 40 * model.codebook.num_embeddings)
    generator = stream(seed, KMEANS, 1)
    picked = []
    for rows, share in zip(per_scale, weights / weights.sum(), strict=True):
        wanted = min(len(rows), max(1, int(budget * share)))
        picked.append(rows[torch.from_numpy(generator.permutation(len(rows))[:wanted])])
    model.codebook.weight.copy_(k_means(torch.cat(picked), model.codebook.num_embeddings, seed=seed))


@torch.no_grad()
def revive_codes(model: MultiScaleVQVAE, dead: Bool[Tensor, " k"], latents: LatentMap, *, seed: int, step: int) -> int:
    """Move codes that no scale uses onto residuals of the present batch; returns how many moved."""
    count = int(dead.sum())
    if not count:
        return 0
    generator = stream(seed, REVIVE, step)
    per_scale = residual_vectors(model, latents.float(), exact=False)
    scales = generator.integers(len(per_scale), size=count)
    rows = torch.stack([per_scale[k][generator.integers(len(per_scale[k]))] for k in scales])
    model.codebook.weight[dead] = rows.to(model.codebook.weight)
    return count
