"""The terms of the D-AR objective by hand, and draws that belong to positions."""

import math

import numpy as np
import pytest
import torch

from isthmus.dar.decoder import FlowDecoder
from isthmus.dar.runs import DiffusionTokenizerLoss
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer, DiffusionTokenizerOutput
from isthmus.dar.tokenizer_losses import (
    DiffusionTrainingOutput,
    alignment_loss,
    diffusion_losses,
    group_spans,
    prefix_mean,
    raw_times,
    readout_loss,
    training_noise,
)
from isthmus.dar.train_tokenizer import PrefixReadout, TokenizerWithDecoder
from isthmus.errors import UserError
from tests.testers import NETWORK, randomized

SCHEDULER = FlowMatchingScheduler(num_groups=4, num_tokens=8)


def groups_of(raw_t):
    return (SCHEDULER.window_of(raw_t.flatten()) // 2).tolist()


@pytest.fixture(scope="module")
def network():
    tokenizer = DiffusionTokenizer(
        image_size=8, patch_size=4, width=16, num_layers=1, condition_width=16, num_condition_layers=1, head_width=8,
        num_tokens=8, num_groups=4, codebook_size=16, codebook_dim=4,
    )  # fmt: skip
    decoder = FlowDecoder(patch_size=2, width=16, num_layers=2, condition_width=16, head_width=8)
    return TokenizerWithDecoder(randomized(tokenizer), randomized(decoder), SCHEDULER)


def draws(positions, levels, **changes):
    settings = {"kind": "uniform", "num_groups": 4, "seed": 1} | changes
    return raw_times(positions, levels, **settings), training_noise(positions, levels, (8, 8), seed=1)


def test_codebook_errors_count_for_the_tokens_that_were_used():
    errors = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]])
    # image 0 was used up to token 2 and up to token 4, image 1 up to token 2 twice
    ends = torch.tensor([[2, 4], [2, 2]])
    by_hand = (2 * 1 + 2 * 2 + 4 + 8 + 2 * 16 + 2 * 32) / 10
    torch.testing.assert_close(prefix_mean(errors, ends), torch.tensor(by_hand))


def test_parts_with_a_common_count_add_up_to_the_whole():
    errors, ends = torch.rand(6, 8), torch.randint(1, 9, (6, 2))
    counted = ends.sum() / 3
    parts = [prefix_mean(errors[i : i + 2], ends[i : i + 2], counted) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), prefix_mean(errors, ends))


def test_alignment_is_blind_to_length_and_averages_to_the_coarser_grid():
    coarse = torch.randn(2, 5, 2, 2)
    fine = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert alignment_loss(3 * coarse, fine).item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(-coarse, fine).item() == pytest.approx(2, abs=1e-6)


def test_a_readout_of_whole_images_is_measured_against_averaged_ones():
    images = torch.randn(2, 3, 4, 4)
    small = torch.nn.functional.avg_pool2d(images, 2).unsqueeze(1).repeat(1, 3, 1, 1, 1)
    assert readout_loss(small, images).item() == pytest.approx(0, abs=1e-12)
    small[:, 1] += 1
    assert readout_loss(small, images).item() == pytest.approx(1 / 3, rel=1e-5)


def test_readouts_of_codes_add_up_and_those_of_conditions_do_not():
    tokens = torch.randn(2, 6, 4)
    changed = tokens.clone()
    changed[:, :2] += 1
    for cumulative in (True, False):
        head = PrefixReadout(3, 8, 2, cumulative=cumulative)
        moved = (head(tokens) != head(changed)).flatten(2).any(dim=2).any(dim=0)
        assert moved.tolist() == [True, cumulative, cumulative]


def test_only_named_losses_are_minimised():
    # an error of one in the velocity, over data_std squared, is a flow loss of 4
    codes, errors = torch.zeros(2, 4, 3), torch.ones(2, 4)
    encoded = DiffusionTokenizerOutput(codes, torch.zeros(2, 4, dtype=torch.long), codes, codes, errors, errors)
    output = DiffusionTrainingOutput(
        velocity=torch.zeros(2, 3, 4, 4), target=torch.ones(2, 3, 4, 4), jump=torch.zeros(2, 3, 4, 4),
        encoded=encoded, ends=torch.full((2, 1), 4),
    )  # fmt: skip
    images = torch.full((2, 3, 4, 4), 2.0)
    losses = diffusion_losses(output, images, DiffusionTokenizerLoss(), data_std=0.5)
    weighted = {name: value.item() for name, value in losses.items() if name.startswith("weighted/")}
    assert weighted == pytest.approx({"weighted/flow": 4.0, "weighted/codebook": 1.0, "weighted/commitment": 0.25})
    assert losses["jump"].item() == pytest.approx(4.0)
    with_jump = diffusion_losses(output, images, DiffusionTokenizerLoss(jump=0.5), data_std=0.5)
    assert with_jump["weighted/jump"].item() == pytest.approx(2.0)


def test_one_level_at_a_time_gives_what_all_at_once_give(network):
    images, positions = torch.randn(3, 3, 8, 8), torch.arange(5, 8)
    raw_t, noise = draws(positions, 2)
    with torch.no_grad():
        both = network(images, raw_t, noise)
        for level in range(2):
            one = network(images, raw_t[:, level : level + 1], noise[:, level : level + 1])
            torch.testing.assert_close(both.velocity.unflatten(0, (3, 2))[:, level], one.velocity, **NETWORK)
            torch.testing.assert_close(both.jump.unflatten(0, (3, 2))[:, level], one.jump, **NETWORK)
            assert torch.equal(both.ends[:, level], one.ends[:, 0])


def test_a_perfect_velocity_jumps_to_the_image(network):
    images, positions = torch.randn(2, 3, 8, 8), torch.arange(2)
    raw_t, noise = draws(positions, 3, latest=0.9)
    t = SCHEDULER.shift(raw_t.flatten())
    repeated = images.repeat_interleave(3, dim=0)
    x_t = SCHEDULER.add_noise(repeated, noise.flatten(0, 1), t)
    target = SCHEDULER.velocity_target(repeated, noise.flatten(0, 1))
    torch.testing.assert_close(SCHEDULER.jump(x_t, target, t), repeated, atol=1e-5, rtol=0)
    torch.testing.assert_close(network(images, raw_t, noise).target, target)


def test_draws_belong_to_positions_not_to_batches():
    positions = torch.arange(100, 112)
    for kind in ("uniform", "balanced"):
        raw_t, noise = draws(positions, 3, kind=kind)
        parts = [draws(part, 3, kind=kind) for part in positions.split([5, 7])]
        assert torch.equal(raw_t, torch.cat([part[0] for part in parts]))
        assert torch.equal(noise, torch.cat([part[1] for part in parts]))
        assert len(raw_t.unique()) == raw_t.numel() and not torch.equal(noise[0], noise[1])
        assert not torch.equal(raw_t, draws(positions, 3, kind=kind, seed=2)[0])


def test_balanced_times_visit_every_group_equally_often():
    for num_levels in (1, 2, 3, 8):
        raw_t, _ = draws(torch.arange(32), num_levels, kind="balanced", latest=15 / 16)
        assert np.bincount(groups_of(raw_t)).tolist() == [8 * num_levels] * 4
        assert raw_t.max() < 15 / 16 and raw_t.min() >= 0


def test_uniform_times_give_the_first_group_half_a_share():
    raw_t = raw_times(torch.arange(4000), 1, kind="uniform", num_groups=4, seed=0)
    shares = np.bincount(groups_of(raw_t)) / 4000
    # 1/8, 1/4, 1/4, 3/8; four standard deviations of a share are less than 0.031
    assert shares == pytest.approx([0.125, 0.25, 0.25, 0.375], abs=4 * math.sqrt(0.25 / 4000))


def test_times_that_leave_the_last_group_nothing_are_refused():
    assert group_spans(4, 0.7)[-1] == (0.625, 0.7)
    with pytest.raises(UserError, match=r"latest_time must be more than 0\.625"):
        raw_times(torch.arange(2), 1, kind="balanced", num_groups=4, latest=0.5, seed=0)


def test_weights_that_make_no_sense_are_refused():
    for changes, message in (
        ({"perceptual_network": "lpips"}, "lpips_weights"),
        ({"alignment_network": "dinov2"}, "alignment_folder"),
        ({"noise_levels": 0}, "noise_levels"),
        ({"latest_time": 1.5}, "latest_time"),
        ({"jump": -1.0}, "jump"),
        ({"perceptual": -1.0}, "perceptual"),
        ({"alignment_taps": ()}, "at least one block"),
    ):
        with pytest.raises(UserError, match=message):
            DiffusionTokenizerLoss(**changes)
