import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.dar.scheduler import interpolate, jump_to_image, shift_time, time_waves, velocity_towards


def images(seed):
    return torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_shift_has_an_inverse_and_keeps_the_ends(raw_t, shift):
    t = torch.tensor([0.0, raw_t, 1.0], dtype=torch.float64)
    shifted = shift_time(t, shift)
    torch.testing.assert_close(shift_time(shifted, 1 / shift), t)
    assert shifted[0] == 0 and shifted[2] == 1
    assert 0 <= shifted[1] <= 1


def test_shift_of_two_by_hand():
    torch.testing.assert_close(shift_time(torch.tensor([0.125, 0.75]), 2.0), torch.tensor([0.125 / 1.875, 0.6]))
    grid = torch.linspace(0, 1, 9)
    assert torch.equal(shift_time(grid, 1.0), grid)
    # more of the steps lie near the noise
    assert torch.all(shift_time(grid, 2.0)[1:-1] < grid[1:-1])


def test_the_path_is_straight_and_the_jump_ends_it():
    noise, image, t = images(0), images(1), torch.tensor([0.0, 0.3, 0.99])
    x_t = interpolate(noise, image, t)
    assert torch.equal(x_t[0], noise[0])
    torch.testing.assert_close(x_t[1], 0.3 * image[1] + 0.7 * noise[1])
    torch.testing.assert_close(jump_to_image(x_t, image - noise, t), image)
    one_for_all = interpolate(noise, image, torch.full((3,), 0.4))
    torch.testing.assert_close(jump_to_image(one_for_all, image - noise, torch.tensor([0.4])), image)


def test_velocity_towards_an_image_is_that_of_the_path_until_the_time_left_is_short():
    noise, image, t = images(0), images(1), torch.tensor([0.0, 0.5, 0.95])
    velocity = velocity_towards(image, interpolate(noise, image, t), t)
    torch.testing.assert_close(velocity[:2], (image - noise)[:2])
    torch.testing.assert_close(velocity[2], (image - noise)[2] * 0.05 / 0.1)  # not divided by less than 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_waves_by_hand(dtype):
    waves = time_waves(torch.tensor([0.25], dtype=dtype), 4)
    angles = [250.0, 250.0 / 100]
    expected = [*map(math.cos, angles), *map(math.sin, angles)]
    torch.testing.assert_close(waves, torch.tensor([expected]), atol=1e-5, rtol=0)
