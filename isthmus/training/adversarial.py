"""The optional patch GAN of the tokenizers: discriminator, hinge losses, and how much the generator listens to it.

The discriminator judges overlapping patches (Isola et al., 2017). The weight of the generator's loss is the ratio of
the two gradients' norms at the decoder's last weight (Esser et al., 2021), so that neither drowns the other, times a
factor that starts late and warms up, since a decoder that cannot draw yet learns nothing from a critic.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import UserError

_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Convolutional critic: one logit per patch of the image, high for real.

    GroupNorm instead of BatchNorm: an image's verdict depends on no other image, so neither the batch nor the number of
    processes matters, and the generator's pass cannot shift any statistics.

    ==================  ===========================================================================================
    argument            meaning
    ==================  ===========================================================================================
    `base_channels`     channels after the first convolution (a multiple of 8); doubled by each further one, at most 8 x
    `num_downsamples`   stride-2 convolutions (at least 1); a patch is 12 pixels wide for 1, 26 for 2, 54 for 3
    ==================  ===========================================================================================
    """

    def __init__(self, *, base_channels: int = 32, num_downsamples: int = 2):
        super().__init__()
        if num_downsamples < 1 or base_channels < 8 or base_channels % _GROUPS:
            raise UserError(
                f"a patch discriminator needs at least one downsampling and a multiple of {_GROUPS} channels, "
                f"got num_downsamples={num_downsamples} and base_channels={base_channels}. Try 2 and 32."
            )
        widths = [base_channels * min(2**level, 8) for level in range(num_downsamples + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in zip(widths[:-2], widths[1:-1], strict=True):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.GroupNorm(_GROUPS, after), nn.LeakyReLU(0.2)]
        # stride 1: widens the patch without thinning out the verdicts
        layers += [
            nn.Conv2d(widths[-2], widths[-1], 3, 1, 1, bias=False),
            nn.GroupNorm(_GROUPS, widths[-1]),
            nn.LeakyReLU(0.2),
        ]
        layers.append(nn.Conv2d(widths[-1], 1, 3, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 rows columns"]:
        """Logits per patch of images in [-1, 1]; h and w are divided by 2**num_downsamples."""
        return self.layers(images)


def discriminator_hinge_loss(
    real_logits: Float[Tensor, "b 1 h w"], fake_logits: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, ""]:
    """Hinge loss mean relu(1 - real) + mean relu(1 + fake): 2 for an undecided critic, 0 once both margins are kept."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def generator_hinge_loss(fake_logits: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Hinge loss -mean fake: what the generator lowers by being taken for real."""
    return -fake_logits.mean()


def _unchanged(gradient: Tensor) -> Tensor:
    return gradient


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    generator_loss: Float[Tensor, ""],
    last_weight: Float[Tensor, "..."],
    *,
    low: float = 0.015,
    high: float = 1e4,
    average: Callable[[Tensor], Tensor] = _unchanged,
) -> Float[Tensor, ""]:
    """||grad of reconstruction|| / (||grad of generator loss|| + 1e-6) at the decoder's last weight, in [low, high].

    Both losses must depend on `last_weight`, and their graphs stay alive. No gradient flows through the result.
    `average` turns a gradient of this process into the mean over all processes, so that every process uses the weight
    of the global batch. The weight must be whole (single process or DDP), not a shard.
    """
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    (critic,) = torch.autograd.grad(generator_loss, last_weight, retain_graph=True)
    ratio = average(wanted).norm() / (average(critic).norm() + 1e-6)
    return ratio.clamp(low, high).detach()


def warm_up_factor(step: int, *, start: int, warm_up_steps: int) -> float:
    """Share of the generator loss at a step: 0 before `start`, then rising evenly to 1 within `warm_up_steps`.

    >>> [warm_up_factor(step, start=10, warm_up_steps=4) for step in (0, 9, 10, 11, 13, 500)]
    [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    """
    if step < start:
        return 0.0
    if warm_up_steps <= 0:
        return 1.0
    return min(1.0, (step - start + 1) / warm_up_steps)
