"""What each query knows of the image before it looks: a linear map of the image, shrunk."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn

from isthmus.functional.shapes import Images


class LinearQueries(nn.Module):
    """One vector per token, read off the whole image by a linear map of low rank.

    Attention from queries that start alike takes long to tell places apart. With this, tokens differ between images
    from the first step of training on, as those of a linear autoencoder do.

    Args:
        num_tokens: tokens of an image.
        width: width of the vectors.
        side: side that the image is averaged to, in pixels.
        rank: numbers that are read off for each token.
    """

    def __init__(self, num_tokens: int, width: int, *, side: int, rank: int):
        super().__init__()
        self.side, self.num_tokens = side, num_tokens
        self.read = nn.Linear(3 * side**2, num_tokens * rank)
        self.widen = nn.Linear(rank, width)

    def forward(self, images: Images) -> Float[torch.Tensor, "b n width"]:
        """Images in [-1, 1] of any sides."""
        small = F.adaptive_avg_pool2d(images, self.side).flatten(1).to(self.read.weight.dtype)
        return self.widen(self.read(small).unflatten(1, (self.num_tokens, -1)))
