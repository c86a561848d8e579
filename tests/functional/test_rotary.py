import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.dar.attention import grid_rotary_table, rotary_table, rotate, with_unrotated
from isthmus.errors import UserError


def heads(tokens, width, seed=0):
    return torch.randn(2, 3, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_pairs_turn_by_hand():
    table = rotary_table(torch.tensor([0.0, 3.0]), 4, base=100.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 2, 4)
    turned = rotate(x, table)[0, 0]
    torch.testing.assert_close(turned[0], x[0, 0, 0])  # position 0 is the identity
    # pair j turns by 3 * 100^(-2j / 4): 3 and 0.3
    pairs = [complex(1, 2) * cmath.exp(3j), complex(3, 4) * cmath.exp(0.3j)]
    expected = torch.tensor([part for z in pairs for part in (z.real, z.imag)])
    torch.testing.assert_close(turned[1], expected)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(-20, 20))
def test_scores_depend_on_distances_alone(i, j, offset):
    i, j = i + 20, j + 20
    q, k = heads(1, 8), heads(1, 8, seed=1)
    here, there = (
        (rotate(q, rotary_table(torch.tensor([float(a)]), 8)) * rotate(k, rotary_table(torch.tensor([float(b)]), 8)))
        for a, b in ((i, j), (i + offset, j + offset))
    )
    torch.testing.assert_close(here.sum(-1), there.sum(-1), atol=1e-4, rtol=1e-4)


def test_a_grid_turns_one_half_by_row_and_one_by_column():
    rows, columns, width = 3, 4, 16
    grid = grid_rotary_table(rows, columns, width).view(rows, columns, width // 2, 2)
    one_axis = rotary_table(torch.arange(4.0), width // 2)
    for row in range(rows):
        for column in range(columns):
            assert torch.equal(grid[row, column], torch.cat([one_axis[row], one_axis[column]]))


def test_rotation_keeps_lengths_and_follows_memory_of_any_layout():
    table = grid_rotary_table(2, 3, 8)
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x.transpose(1, 2), table)  # heads as projections leave them
    torch.testing.assert_close(turned.norm(dim=-1), x.transpose(1, 2).norm(dim=-1))
    torch.testing.assert_close(turned, rotate(x.transpose(1, 2).contiguous(), table))


def test_tokens_without_a_position_stay_as_they_are():
    table = with_unrotated(grid_rotary_table(2, 2, 8), 3)
    x = heads(7, 8)
    turned = rotate(x, table)
    assert torch.equal(turned[:, :, 4:], x[:, :, 4:])
    assert torch.equal(turned[:, :, :4], rotate(x[:, :, :4], table[:4]))


def test_rotation_is_fp32_inside_and_keeps_the_type_outside():
    table, x = grid_rotary_table(32, 32, 8), heads(1024, 8).bfloat16()
    turned = rotate(x, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), table).bfloat16())


def test_gradients_are_rotations_backwards():
    table, x = grid_rotary_table(2, 3, 8), heads(6, 8).requires_grad_()
    weights = heads(6, 8, seed=1)
    (rotate(x, table) * weights).sum().backward()
    inverse = table * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(x.grad, rotate(weights, inverse))


def test_a_head_that_cannot_hold_two_axes_is_refused():
    with pytest.raises(UserError, match="multiple of 4"):
        grid_rotary_table(2, 2, 6)
