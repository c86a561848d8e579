"""The nearest code of a codebook, and the means a codebook starts from."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.nn.draws import KMEANS, stream

# rows of the distance matrix held at once: 8,192 x 4,096 codes are 128 MiB in fp32
_SEARCH_CHUNK = 8_192


def nearest_code(
    latents: Float[Tensor, "n d"], codebook: Float[Tensor, "k d"], *, normalize: bool = False
) -> Int[Tensor, " n"]:
    """Index of the nearest code: smallest Euclidean distance, or largest cosine where `normalize`.

    Always in fp32: a tie broken another way in half precision is another image.

    >>> nearest_code(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([1])
    """
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        latents, codebook = latents.float(), codebook.float()
        if normalize:
            latents, codebook = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
            return torch.cat([(part @ codebook.T).argmax(dim=1) for part in latents.split(_SEARCH_CHUNK)])
        # |z|^2 is the same for every code, so |e|^2 - 2 z.e orders the codes as the distance does
        squares, parts = codebook.square().sum(dim=1), latents.split(_SEARCH_CHUNK)
        return torch.cat([torch.addmm(squares, part, codebook.T, alpha=-2).argmin(dim=1) for part in parts])


@torch.no_grad()
def k_means(points: Float[Tensor, "n d"], num_means: int, *, seed: int, num_rounds: int = 10) -> Float[Tensor, "k d"]:
    """Lloyd's algorithm from a random subset of the points; a mean that loses all its points moves to one of them.

    With fewer points than means, points repeat with a little noise, so that no two codes are the same.
    """
    generator = stream(seed, KMEANS)
    order = torch.from_numpy(generator.permutation(len(points)))
    means = points[order[torch.arange(num_means) % len(points)]].clone()
    spread = points.std(dim=0, unbiased=False).clamp_min(1e-6)
    noise = torch.from_numpy(generator.standard_normal((num_means, points.shape[1]))).to(points)
    if len(points) < num_means:
        return means + 0.01 * spread * noise
    for _ in range(num_rounds):
        nearest = torch.cat([torch.cdist(part, means).argmin(dim=1) for part in points.split(8192)])
        counts = torch.bincount(nearest, minlength=num_means).to(points).unsqueeze(1)
        sums = torch.zeros_like(means).index_add_(0, nearest, points)
        empty = counts.squeeze(1) == 0
        means = torch.where(counts > 0, sums / counts.clamp_min(1), means)
        if empty.any():
            chosen = torch.from_numpy(generator.integers(len(points), size=int(empty.sum())))
            means[empty] = points[chosen]
    return means
