"""Laws of the scheduler: its time grid, the window of every step, and solvers on fields whose solution is known."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.dar.scheduler import SOLVERS, FlowMatchingScheduler, time_waves, velocity_towards
from isthmus.errors import UserError


def images(seed=0, batch=2):
    return torch.randn(batch, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_shift_has_an_inverse_and_keeps_the_ends(raw_t, shift):
    t = torch.tensor([0.0, raw_t, 1.0], dtype=torch.float64)
    shifted = FlowMatchingScheduler(time_shift=shift).shift(t)
    torch.testing.assert_close(FlowMatchingScheduler(time_shift=1 / shift).shift(shifted), t)
    assert shifted[0] == 0 and shifted[2] == 1
    assert 0 <= shifted[1] <= 1


def test_velocity_towards_an_image_is_that_of_the_path_until_the_time_left_is_short():
    noise, image, t = images(0, 3), images(1, 3), torch.tensor([0.0, 0.5, 0.95])
    velocity = velocity_towards(image, FlowMatchingScheduler(data_std=1.0).add_noise(image, noise, t), t)
    torch.testing.assert_close(velocity[:2], (image - noise)[:2])
    torch.testing.assert_close(velocity[2], (image - noise)[2] * 0.05 / 0.1)  # not divided by less than 0.1


def test_waves_by_hand():
    waves = time_waves(torch.tensor([0.25], dtype=torch.float64), 4)
    angles = [250.0, 250.0 / 100]
    expected = [*map(math.cos, angles), *map(math.sin, angles)]
    torch.testing.assert_close(waves, torch.tensor([expected]), atol=1e-5, rtol=0)


def solve(scheduler, field, x, *, start=0, **options):
    """Walk x from step `start` to t = 1 along `field(x, t)`."""
    times, previous = scheduler.times(options.get("num_inference_steps")).tolist(), None
    for index in range(start, len(times) - 1):
        velocity = field(x, times[index])
        x, previous = scheduler.step(velocity, previous, index, x, **options), velocity
    return x


@pytest.fixture
def scheduler():
    return FlowMatchingScheduler(num_tokens=32, time_shift=2.0)


@given(
    solver=st.sampled_from(SOLVERS),
    shift=st.sampled_from([1.0, 2.0, 4.0]),
    steps=st.integers(1, 32),
    start=st.integers(0, 31),
)
def test_a_constant_velocity_is_exact_from_any_step(solver, shift, steps, start):
    scheduler = FlowMatchingScheduler(num_tokens=32, time_shift=shift)
    noise, image = images(0), images(1)
    velocity = scheduler.velocity_target(image, noise)
    start = min(start, steps - 1)
    t = scheduler.times(steps)[start].expand(2)
    x = scheduler.add_noise(image, noise, t)
    end = solve(scheduler, lambda *_: velocity, x, start=start, num_inference_steps=steps, solver=solver)
    torch.testing.assert_close(scheduler.to_image(end), image, atol=1e-5, rtol=1e-5)


def order_of_convergence(scheduler, solver):
    """How the error at t = 1 of dx/dt = x falls when the steps are doubled: its logarithm to base 2."""
    start = torch.ones(1, 3, 1, 1)
    errors = []
    for steps in (32, 64):
        end = solve(scheduler, lambda x, t: x, start, num_inference_steps=steps, solver=solver)
        errors.append(abs(end.mean().item() - math.e))
    return math.log2(errors[0] / errors[1])


def test_order_of_every_solver_on_a_smooth_field():
    for shift in (1.0, 2.0, 4.0):
        scheduler = FlowMatchingScheduler(num_tokens=32, time_shift=shift)
        assert order_of_convergence(scheduler, "euler") == pytest.approx(1, abs=0.15)
        assert order_of_convergence(scheduler, "adams-bashforth-variable") == pytest.approx(2, abs=0.25)


def test_constant_coefficients_are_second_order_on_an_even_grid_only():
    even = FlowMatchingScheduler(time_shift=1.0)
    x, v, w = images(0), images(1), images(2)
    constant, variable = (even.step(v, w, 3, x, solver=name) for name in SOLVERS[1:])
    torch.testing.assert_close(constant, variable)
    # times of shift 2 over 8 steps: 1/3, 5/11 and 3/5 around step 5, so the ratio of the steps is 6/5
    uneven = FlowMatchingScheduler(time_shift=2.0)
    length, ratio = 3 / 5 - 5 / 11, (3 / 5 - 5 / 11) / (5 / 11 - 1 / 3)
    assert ratio == pytest.approx(6 / 5)
    constant, variable = (uneven.step(v, w, 5, x, solver=name) for name in SOLVERS[1:])
    torch.testing.assert_close(constant, x + length * (1.5 * v - 0.5 * w))
    torch.testing.assert_close(variable, x + length * (1.6 * v - 0.6 * w))


def test_the_first_executed_step_is_one_of_euler_wherever_it_is(scheduler):
    x, v = images(0), images(1)
    for index, solver in ((0, "adams-bashforth"), (3, "adams-bashforth"), (3, "adams-bashforth-variable")):
        assert torch.equal(
            scheduler.step(v, None, index, x, solver=solver), scheduler.step(v, v, index, x, solver="euler")
        )


def test_previews_reach_the_end(scheduler):
    def preview(previous, index, **options):
        return scheduler.to_image(scheduler.step(v, previous, index, x, to_end=True, **options))

    x, v, w = images(0), images(1), images(2)
    t = scheduler.times()[3:4]
    torch.testing.assert_close(preview(w, 3, solver="euler"), scheduler.jump(x, v, t))
    torch.testing.assert_close(preview(None, 3), scheduler.jump(x, v, t))
    torch.testing.assert_close(preview(w, 3), scheduler.jump(x, 1.5 * v - 0.5 * w, t))
    # at the last step the preview is the image
    torch.testing.assert_close(preview(w, 7), scheduler.to_image(scheduler.step(v, w, 7, x)))


def test_noise_and_jump_are_inverse_with_a_time_per_image():
    scheduler = FlowMatchingScheduler(data_std=0.5)
    noise, image, t = images(0, 3), images(1, 3), torch.tensor([0.0, 0.25, 1.0])
    x_t = scheduler.add_noise(image, noise, t)
    assert torch.equal(x_t[0], noise[0])
    torch.testing.assert_close(x_t[1], 0.125 * image[1] + 0.75 * noise[1])
    torch.testing.assert_close(scheduler.to_image(x_t)[2], image[2])
    velocity = scheduler.velocity_target(image, noise)
    torch.testing.assert_close(scheduler.jump(x_t, velocity, t), image)
    one_for_all = scheduler.add_noise(image, noise, torch.full((3,), 0.4))
    torch.testing.assert_close(scheduler.jump(one_for_all, velocity, torch.tensor([0.4])), image)


def test_times_by_hand():
    expected = [0, 1 / 15, 1 / 7, 3 / 13, 1 / 3, 5 / 11, 3 / 5, 7 / 9, 1]
    torch.testing.assert_close(FlowMatchingScheduler().times(), torch.tensor(expected), atol=1e-7, rtol=0)
    assert FlowMatchingScheduler().times(3).shape == (4,)
    raw_t = torch.linspace(0, 1, 9)
    torch.testing.assert_close(FlowMatchingScheduler().shift(raw_t), torch.tensor(expected))
    assert torch.equal(FlowMatchingScheduler(time_shift=1.0).shift(raw_t), raw_t)


@pytest.mark.slow
@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 20), st.data())
def test_windows_stay_inside_move_on_and_end_with_the_last_token(groups, per_group, steps, data):
    tokens = groups * per_group
    window = data.draw(st.integers(per_group, tokens))
    scheduler = FlowMatchingScheduler(num_tokens=tokens, num_groups=groups, tokens_per_step=window)
    windows = scheduler.windows(steps)
    assert len(windows) == steps
    assert all(0 <= start and end <= tokens and end - start == window for start, end in windows)
    assert list(windows) == sorted(windows) and windows[0][0] == 0
    if steps >= groups:
        assert windows[-1][1] == tokens


@given(st.integers(1, 8), st.integers(1, 40))
def test_training_and_sampling_agree_on_the_window(groups, steps):
    scheduler = FlowMatchingScheduler(num_tokens=groups * 4, num_groups=groups)
    # times of the grid, a little early, so that a tie in exact arithmetic is none here either
    raw_t = torch.arange(steps, dtype=torch.float64) / steps
    late = (raw_t + 1e-9).clamp(max=1).float()
    starts = scheduler.window_of(late).tolist()
    exact = [start for start, _ in scheduler.windows(steps)]
    ties = [(2 * i * groups + steps) % (2 * steps) == 0 for i in range(steps)]
    assert all(a == b or tie for a, b, tie in zip(starts, exact, ties, strict=True))


def test_groups_of_random_times_have_the_published_shares():
    # groups 0..7 are trained for raw times below 1/16, then 1/8 each, then the last 3/16
    scheduler = FlowMatchingScheduler(num_tokens=8)
    starts = scheduler.window_of((torch.arange(1600) + 0.5) / 1600)
    assert torch.bincount(starts).tolist() == [100, 200, 200, 200, 200, 200, 200, 300]
    # as many steps as groups take one group each
    assert scheduler.windows() == tuple((g, g + 1) for g in range(8))
    assert scheduler.window_of(torch.tensor([0.0, 1.0])).tolist() == [0, 7]


def test_save_and_load(tmp_path):
    scheduler = FlowMatchingScheduler(num_tokens=24, num_groups=6, tokens_per_step=8, solver="euler", data_std=0.5)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "FlowMatchingScheduler"
    loaded = FlowMatchingScheduler.from_pretrained(tmp_path)
    assert loaded.windows(9) == scheduler.windows(9) and loaded.config == scheduler.config


def test_half_precision_velocities_move_a_fp32_state(scheduler):
    x, v = images(0), images(1)
    moved = scheduler.step(v.bfloat16(), None, 0, x)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, scheduler.step(v.bfloat16().float(), None, 0, x))


def test_what_is_out_of_range_is_named():
    for arguments, message in [
        ({"num_groups": 7}, "multiple of num_groups"),
        ({"num_groups": 0}, "multiple of num_groups"),
        ({"tokens_per_step": 31}, r"32\.\.256"),
        ({"tokens_per_step": 257}, r"32\.\.256"),
        ({"time_shift": 0.0}, "positive"),
        ({"data_std": -0.5}, "positive"),
        ({"num_inference_steps": 0}, "at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            FlowMatchingScheduler(**arguments)
    scheduler, x = FlowMatchingScheduler(), images()
    with pytest.raises(UserError, match="at least 1, got 0"):
        scheduler.times(0)
    for index, options, last in ((-1, {}, 7), (8, {}, 7), (5, {"num_inference_steps": 4}, 3)):
        with pytest.raises(UserError, match=rf"0\.\.{last}"):
            scheduler.step(x, None, index, x, **options)
