"""Where a codebook starts from: the means of what an encoder puts out."""

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.functional.draws import KMEANS, stream


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
