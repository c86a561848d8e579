"""The norm of D-AR's tokenizer (spec of D-AR, 1.1)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

NORM_EPS = 1e-6
"""Epsilon of every norm in the tokenizer."""


def plain_norm(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """LayerNorm over the last axis, without parameters of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
