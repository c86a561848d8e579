"""Rotary positions: pairs of channels (2j, 2j + 1) of queries and keys turn by angles that grow with the position.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2. Where tokens lie is
the caller's to say: each model has its own table.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.nn.attention import Attend, Heads

RotaryTable = Float[Tensor, "l pairs 2"]
"""Cosine and sine of every position and pair, in fp32."""


def rotary_table(positions: Float[Tensor, " l"], width: int, base: float = 10_000.0) -> RotaryTable:
    """Pair j of `width` / 2 turns by position * base^(-2j / width); position 0 is the identity.

    The angles are computed in float64 and rounded once.

    >>> rotary_table(torch.tensor([0.0, torch.pi]), 2).round().int().tolist()
    [[[1, 0]], [[-1, 0]]]
    """
    # an accelerator without float64 gets its table from the CPU
    place = torch.device("cpu") if positions.device.type == "mps" else positions.device
    exponents = torch.arange(0, width, 2, device=place, dtype=torch.float64) / width
    angles = positions.to(place).double()[:, None] * base**-exponents
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(positions.device)


def rotate(x: Float[Tensor, "b heads l c"], table: RotaryTable) -> Float[Tensor, "b heads l c"]:
    """Turn every pair of channels (a, b) to (cos a - sin b, sin a + cos b), in fp32, returned in the type of `x`."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # compilers have no code for complex numbers, and join these products themselves
        (a, b), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
        return torch.stack([a * cosine - b * sine, a * sine + b * cosine], dim=-1).flatten(-2).to(x.dtype)
    # complex multiplication is this rotation, in one pass over memory
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def rotated(attend: Attend, table: RotaryTable) -> Attend:
    """The attention `attend` with queries and keys turned first; a cache then keeps keys as they were turned."""

    def turning(q: Heads, k: Heads, v: Heads, softmax_scale: float) -> Heads:
        own = table.to(q.device)
        return attend(rotate(q, own), rotate(k, own), v, softmax_scale)

    return turning
