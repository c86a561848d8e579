"""Adaptive layer normalisation: a class vector scales, shifts and gates what a block does (spec of VAR, 2.3)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def modulated_norm(
    x: Float[Tensor, "b l width"], scale: Float[Tensor, "b 1 width"], shift: Float[Tensor, "b 1 width"], eps: float
) -> Float[Tensor, "b l width"]:
    """LayerNorm(x) * (1 + scale) + shift, the norm without parameters of its own."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class BlockModulation(nn.Module):
    """Six vectors of one block from silu(class vector), by a linear layer of the block's own."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, activated: Float[Tensor, "b width"]) -> Float[Tensor, "b 6 width"]:
        """Gates of attention and feed-forward, their scales, their shifts: in this order."""
        return self.linear(activated).unflatten(-1, (6, -1))


class SharedModulationOffset(nn.Module):
    """Six vectors of one block as an offset to vectors that all blocks share (`shared_adaln`)."""

    def __init__(self, width: int):
        super().__init__()
        self.offset = nn.Parameter(torch.empty(1, 6, width))
        nn.init.normal_(self.offset, std=1 / math.sqrt(width))

    def forward(self, shared: Float[Tensor, "b 6 width"]) -> Float[Tensor, "b 6 width"]:
        """Gates of attention and feed-forward, their scales, their shifts: in this order."""
        return shared + self.offset
