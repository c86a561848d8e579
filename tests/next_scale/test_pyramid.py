import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import (
    ScaleSchedule,
    area_downsample,
    bicubic_upsample,
    default_phi_indices,
    next_scale_input,
    tokens_to_map,
)
from isthmus.nn import quantization
from isthmus.nn.quantization import nearest_code
from isthmus.nn.sampling import nats_to_bits

SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=8, unique=True).map(sorted)


@given(SIZES)
def test_lengths_and_offsets_agree(sizes):
    schedule = ScaleSchedule(tuple(sizes), (0,) * len(sizes))
    assert schedule.grid == sizes[-1] and schedule.num_scales == len(sizes)
    assert schedule.offsets[0] == 0 and schedule.offsets[-1] == schedule.num_tokens == sum(s * s for s in sizes)
    assert [b - a for a, b in pairwise(schedule.offsets)] == list(schedule.lengths)


@given(SIZES, st.integers(1, 6))
def test_phi_indices_rise_and_stay_in_range(sizes, num_phi):
    phi = default_phi_indices(len(sizes), num_phi)
    assert len(phi) == len(sizes) and list(phi) == sorted(phi)
    assert 0 <= min(phi) and max(phi) < num_phi


@given(SIZES, st.data())
def test_a_derived_schedule_keeps_sides_and_phi(sizes, data):
    parent = ScaleSchedule(tuple(sizes), tuple(range(len(sizes))))
    kept = sorted(data.draw(st.sets(st.sampled_from(sizes))) | {sizes[-1]})
    derived = parent.derive(kept)
    assert derived.sizes == tuple(kept)
    assert [parent.sizes[i] for i in derived.phi_indices] == kept
    assert derived.derive(kept) == derived and parent.derive(parent.sizes) == parent


def test_schedules_that_make_no_sense():
    for sizes, phi, said in [
        ((), (), "increase"), ((0, 1), (0, 0), "positive"), ((2, 1), (0, 0), "increase"), ((1, 1), (0, 0), "increase"),
        ((1, 2), (0,), "one non-negative integer per scale"), ((1, 2), (0, -1), "one non-negative integer per scale"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=said):
            ScaleSchedule(sizes, phi)
    parent = ScaleSchedule((1, 2, 4), (0, 1, 2))
    for sizes in ((), (1, 2), (1, 8), (1, 3, 4)):
        with pytest.raises(UserError, match="ending at 4"):
            parent.derive(sizes)


def test_area_averages_overlapping_windows():
    # 5 rows to 3: bin i covers rows floor(5 i / 3) .. ceil(5 (i + 1) / 3) - 1, here 0-1, 1-3, 3-4
    rows = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    found = area_downsample(rows[None, None, :, None].expand(1, 1, 5, 5), 3)
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor([0.5, 2.0, 3.5]))


def test_a_constant_map_stays_constant():
    constant = torch.full((2, 3, 7, 7), 1.5)
    for side in (1, 2, 3, 7):
        small = area_downsample(constant, side)
        torch.testing.assert_close(small, torch.full((2, 3, side, side), 1.5))
        torch.testing.assert_close(bicubic_upsample(small, 7), constant)


def test_the_same_side_is_the_same_tensor():
    features = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert area_downsample(features, 4) is features
    assert bicubic_upsample(features, 4) is features


def test_bicubic_of_a_step_overshoots_with_a_three_quarters():
    # half-pixel centres: output 0 of 2 -> 4 lies at -0.25, a = -0.75 weighs [edge, edge, x0, x1] at distances
    # 1.75, 0.75, 0.25, 1.25 of clamped neighbours (x0, x0, x0, x1)
    def weight(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a

    image = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    assert float(bicubic_upsample(image, 4)[0, 0, 0, 0]) == pytest.approx(weight(1.25), abs=1e-6)


def test_bits():
    assert nats_to_bits(math.log(1024)) == pytest.approx(10)


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


def test_chunks_change_nothing():
    codebook, latents = normal(9, 4, seed=1), normal(quantization._SEARCH_CHUNK + 5, 4)
    for normalize in (False, True):
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
