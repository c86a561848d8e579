"""The two-layer perceptron of a transformer block."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Linear, GELU in its tanh approximation, Linear.

    Args:
        width: width in and out.
        hidden: width between.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b l width"]) -> Float[Tensor, "b l width"]:
        """Same shape as the input."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))
