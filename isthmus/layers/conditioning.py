"""Adaptive layer normalisation: a class vector scales, shifts and gates what a block does (spec of VAR, 2.3)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.layers.attention import trains_on_cpu


def modulated_norm(
    x: Float[Tensor, "b l width"], scale: Float[Tensor, "b 1 width"], shift: Float[Tensor, "b 1 width"], eps: float
) -> Float[Tensor, "b l width"]:
    """LayerNorm(x) * (1 + scale) + shift, the norm without parameters of its own."""
    # a loop over images pays from some kilobytes of tokens on; compilers join the two steps themselves
    if trains_on_cpu(x) and x[0].numel() >= 2**12 and not torch.compiler.is_compiling():
        return _ModulatedNorm.apply(x, scale, shift, eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


class _ModulatedNorm(torch.autograd.Function):
    """One layer norm per image, whose gain and bias are the image's modulation: one pass over memory each way.

    The result has the type of the modulation, that of the product which reads it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        gain, bias = (1 + scale.float()).squeeze(1), shift.float().squeeze(1)
        result, statistics = torch.empty_like(x, dtype=scale.dtype), []
        for i in range(len(x)):
            result[i], *own = torch.native_layer_norm(x[i], x.shape[-1:], gain[i], bias[i], eps)
            statistics += own
        ctx.save_for_backward(x, gain, bias, *statistics)
        ctx.dtype = scale.dtype
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, bias, *statistics = ctx.saved_tensors
        of_x, of_gain, of_bias = (torch.empty_like(t) for t in (x, gain, bias))
        for i in range(len(x)):
            mean, reciprocal = statistics[2 * i : 2 * i + 2]
            of_x[i], of_gain[i], of_bias[i] = torch.ops.aten.native_layer_norm_backward(
                gradient[i].to(x.dtype), x[i], x.shape[-1:], mean, reciprocal, gain[i], bias[i], [True, True, True]
            )
        return of_x, of_gain.unsqueeze(1).to(ctx.dtype), of_bias.unsqueeze(1).to(ctx.dtype), None


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
