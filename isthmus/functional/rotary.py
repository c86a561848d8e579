"""Rotary position embedding: positions turn pairs of channels by angles, so that scores depend on distances.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2. Pairs are interleaved:
channels (2j, 2j + 1) belong together. In two dimensions the first half of a head turns with the row, the second half
with the column (spec of D-AR, 1.1).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError

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


def llama_angles(positions: Int[Tensor, " l"], width: int, base: float) -> Float[Tensor, "l pairs"]:
    """The same angles as transformers' Llama has them: frequencies base^(-2j / width) rounded to fp32 first.

    >>> llama_angles(torch.tensor([0, 3]), 2, 10_000.0).tolist()
    [[0.0], [3.0]]
    """
    exponents = torch.arange(0, width, 2, device=positions.device).float() / width
    return positions.float()[:, None] * (1.0 / base**exponents)


def grid_rotary_table(
    rows: int, columns: int, width: int, base: float = 10_000.0, *, device: torch.device | None = None
) -> RotaryTable:
    """Table of a grid of patches, row by row: half the pairs turn with the row, half with the column (not normalised).

    Raises:
        UserError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"a head must be a multiple of 4 wide (pairs of channels for two axes), got {width}.")
    row, column = (
        rotary_table(torch.arange(side, device=device, dtype=torch.float32), width // 2, base)
        for side in (rows, columns)
    )
    halves = [row[:, None].expand(-1, columns, -1, -1), column[None].expand(rows, -1, -1, -1)]
    return torch.cat(halves, dim=2).flatten(0, 1)


def with_unrotated(table: RotaryTable, count: int) -> Float[Tensor, "longer pairs 2"]:
    """The table followed by `count` tokens without a position (the identity)."""
    identity = torch.tensor([1.0, 0.0], device=table.device, dtype=torch.float32).expand(count, table.shape[1], 2)
    return torch.cat([table, identity])


def rotate(x: Float[Tensor, "b heads l c"], table: RotaryTable) -> Float[Tensor, "b heads l c"]:
    """Turn every pair of channels (a, b) to (cos a - sin b, sin a + cos b), in fp32, returned in the type of `x`."""
    pairs = x.float().unflatten(-1, (-1, 2))
    # complex multiplication is this rotation, in one pass over memory
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
