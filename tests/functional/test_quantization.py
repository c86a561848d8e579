import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.next_scale.pyramid import ScaleSchedule, next_scale_input, residual_scales, tokens_to_map
from isthmus.nn import quantization
from isthmus.nn.quantization import nearest_code


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 6), st.integers(0, 1000))
def test_nearest_code_is_the_smallest_distance(rows, codes, dim, seed):
    latents, codebook = normal(rows, dim, seed=seed), normal(codes, dim, seed=seed + 1)
    distances = (latents.double()[:, None] - codebook.double()).square().sum(dim=-1)
    found = nearest_code(latents, codebook)
    chosen = distances.gather(1, found[:, None])[:, 0]
    # |e|^2 - 2 z.e in fp32: each of its terms is rounded, and two codes may be as near to within that
    rounding = 2 * dim * 2**-24 * float(latents.norm(dim=1).max() + codebook.norm(dim=1).max()) ** 2
    torch.testing.assert_close(chosen, distances.amin(dim=1), atol=rounding, rtol=0)


def test_a_code_is_nearest_to_itself():
    codebook = normal(50, 6)
    assert torch.equal(nearest_code(codebook, codebook), torch.arange(50))
    assert torch.equal(nearest_code(codebook * 7, codebook, normalize=True), torch.arange(50))


@pytest.mark.parametrize("normalize", [False, True])
def test_chunks_change_nothing(normalize):
    codebook = normal(9, 4, seed=1)
    latents = normal(quantization._SEARCH_CHUNK + 5, 4)
    whole = nearest_code(latents, codebook, normalize=normalize)
    parts = [nearest_code(part, codebook, normalize=normalize) for part in latents.split(777)]
    assert torch.equal(whole, torch.cat(parts))


def test_search_is_fp32_under_autocast_and_for_half_inputs():
    latents, codebook = normal(200, 8), normal(500, 8, seed=1)
    plain = nearest_code(latents, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(latents, codebook), plain)
    rounded = nearest_code(latents.bfloat16(), codebook.bfloat16())
    assert torch.equal(rounded, nearest_code(latents.bfloat16().float(), codebook.bfloat16().float()))


def test_search_has_no_gradient():
    found = nearest_code(normal(3, 2).requires_grad_(), normal(4, 2).requires_grad_())
    assert not found.requires_grad


def test_rows_and_maps_are_inverse():
    rows = normal(2, 9, 5)
    codes = tokens_to_map(rows)
    assert codes.shape == (2, 5, 3, 3)
    # row by row: token 1 is the second column of the first row
    assert torch.equal(codes[:, :, 0, 1], rows[:, 1])
    schedule = ScaleSchedule((1, 3), (0, 0))
    assert torch.equal(next_scale_input(codes, schedule, 1), rows)


def test_the_residual_loop_by_hand():
    schedule = ScaleSchedule((1, 2), (0, 1))
    offered = [torch.full((1, 1, 1, 1), 2.0), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])]
    seen = []

    def choose(scale, features):
        seen.append(features.clone())
        return torch.full((1, schedule.lengths[scale]), scale), offered[scale]

    states = list(residual_scales(torch.zeros(1, 1, 2, 2), schedule, choose, lambda k, h: h * (10 if k else 1)))
    assert [state.index for state in states] == [0, 1]
    assert seen[0].sum() == 0 and torch.equal(seen[1], states[0].features)
    assert torch.equal(states[0].features, torch.full((1, 1, 2, 2), 2.0))
    assert torch.equal(states[1].features, 2 + 10 * offered[1])


def test_the_residual_loop_leaves_earlier_features_alone():
    start = torch.zeros(1, 1, 2, 2)
    schedule = ScaleSchedule((1, 2), (0, 0))

    def choose(scale, _):
        side = schedule.sizes[scale]
        return torch.zeros(1, side * side, dtype=torch.long), torch.ones(1, 1, side, side)

    kept = list(residual_scales(start, schedule, choose, lambda _, h: h))
    assert start.sum() == 0
    assert [float(state.features.mean()) for state in kept] == [1, 2]
