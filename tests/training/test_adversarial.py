import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.next_scale.train_tokenizer import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
    warm_up_factor,
)


def test_a_logit_sees_a_patch_of_the_documented_size():
    torch.manual_seed(0)
    judge = PatchDiscriminator(base_channels=8)
    # without the norms, which look at the whole image, only the convolutions spread what a logit sees
    convolutions = torch.nn.Sequential(*(m for m in judge.layers if not isinstance(m, torch.nn.GroupNorm)))
    images = torch.zeros(1, 3, 96, 96, requires_grad=True)
    logits = convolutions(images)
    assert logits.shape == judge(images).shape == (1, 1, 24, 24)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 26


def test_an_image_does_not_feel_its_neighbours():
    torch.manual_seed(0)
    judge, images = PatchDiscriminator(base_channels=16), torch.rand(3, 3, 32, 32) * 2 - 1
    alone = torch.cat([judge(image[None]) for image in images])
    torch.testing.assert_close(judge(images), alone, rtol=1e-4, atol=1e-5)


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="must be a multiple of 8, got 12"):
        PatchDiscriminator(base_channels=12)


def test_hinge_losses_by_hand():
    real = torch.tensor([2.0, 0.5, -1.0]).view(1, 1, 1, 3)
    fake = torch.tensor([-2.0, 0.0, 1.0]).view(1, 1, 1, 3)
    # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2
    torch.testing.assert_close(discriminator_hinge_loss(real, fake), torch.tensor(2.5 / 3 + 3 / 3))
    torch.testing.assert_close(generator_hinge_loss(fake), torch.tensor(1 / 3))
    undecided = torch.zeros(1, 1, 4, 4)
    assert discriminator_hinge_loss(undecided, undecided) == 2


def test_a_discriminator_learns_and_a_generator_follows():
    """A few steps tell grey from noise; the generator's gradient then raises the logit of its image."""
    torch.manual_seed(0)
    judge = PatchDiscriminator(base_channels=8)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    for _ in range(30):
        real, fake = torch.rand(8, 3, 16, 16) * 2 - 1, torch.rand(8, 3, 1, 1).expand(8, 3, 16, 16) * 2 - 1
        loss = discriminator_hinge_loss(judge(real), judge(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    before = generator_hinge_loss(judge(image))
    (gradient,) = torch.autograd.grad(before, image)
    step = 0.05 * gradient / gradient.abs().max()
    assert generator_hinge_loss(judge(image - step)) < before


def two_losses(reconstruction_slope: float, generator_slope: float) -> tuple[torch.Tensor, ...]:
    """Losses linear in four weights, whose gradients are constant: norm = 2 * |slope|."""
    weight = torch.zeros(2, 2, requires_grad=True)
    return (reconstruction_slope * weight).sum(), (generator_slope * weight).sum(), weight


@given(st.floats(1, 50), st.floats(1, 50))
def test_adaptive_weight_balances_the_gradients(reconstruction_slope, generator_slope):
    reconstruction, generator, weight = two_losses(reconstruction_slope, -generator_slope)
    ratio = adaptive_weight(reconstruction, generator, weight)
    assert not ratio.requires_grad
    (balanced,) = torch.autograd.grad(ratio * generator, weight)
    torch.testing.assert_close(balanced.norm(), torch.tensor(2 * reconstruction_slope), rtol=1e-4, atol=1e-4)


def test_adaptive_weight_stays_within_its_bounds():
    assert adaptive_weight(*two_losses(1.0, 0.0)) == 1e4
    torch.testing.assert_close(adaptive_weight(*two_losses(0.0, 1.0)), torch.tensor(0.015))


def test_adaptive_weight_of_averaged_gradients():
    """`average` sees gradients, not norms: a process whose gradients vanish still gets the others' weight."""
    mean_over_processes = iter([torch.full((2, 2), 3.0), torch.full((2, 2), 0.5)])
    ratio = adaptive_weight(*two_losses(0.0, 0.0), average=lambda _: next(mean_over_processes))
    torch.testing.assert_close(ratio, torch.tensor(6.0))


@given(st.integers(0, 300), st.integers(0, 100), st.integers(0, 100))
def test_warm_up_never_falls_and_keeps_its_ends(step, start, warm_up_steps):
    factor = warm_up_factor(step, start=start, warm_up_steps=warm_up_steps)
    assert 0 <= factor <= warm_up_factor(step + 1, start=start, warm_up_steps=warm_up_steps) <= 1
    assert (factor == 0) == (step < start)
    assert warm_up_factor(start + warm_up_steps, start=start, warm_up_steps=warm_up_steps) == 1
