"""The norms of D-AR's tokenizer (spec of D-AR, 1.1)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

NORM_EPS = 1e-6
"""Epsilon of every norm in the tokenizer."""


def plain_norm(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """LayerNorm over the last axis, without parameters of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation without parameters; in training its statistics are those of all processes' rows together.

    torch's own `SyncBatchNorm` does the same on GPUs alone. Two processes must see what one would.

    Args:
        width: of the rows.
    """

    def __init__(self, width: int):
        super().__init__(width, affine=False)

    def forward(self, input: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Rows with mean 0 and variance 1 per channel (in evaluation: by the running statistics)."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        count = all_reduce(input.new_tensor(float(len(input))))
        # two passes: a variance from sums of squares loses its digits where the mean is large
        mean = all_reduce(input.sum(dim=0)) / count
        variance = all_reduce((input - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum or 0.0)
        return (input - mean) * (variance + self.eps).rsqrt()
