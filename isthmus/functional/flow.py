"""Flow matching as pure functions: straight paths from noise (t = 0) to image (t = 1).

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1 (spec of D-AR, 1.5 and 1.6). Everything
is fp32: a time in bf16 is visibly wrong once it is multiplied by a thousand.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.functional.shapes import Images

Times = Float[Tensor, " n"]


def shift_time(raw_t: Float[Tensor, "*n"], shift: float) -> Float[Tensor, "*n"]:
    """Shifted time raw / (raw + shift (1 - raw)): a shift above 1 spends more steps near the noise, 1 changes nothing.
    It is undone by the reciprocal shift.

    >>> shift_time(torch.tensor([0.0, 0.5, 1.0]), 2.0)
    tensor([0.0000, 0.3333, 1.0000])
    """
    return raw_t / (raw_t + shift * (1 - raw_t))


def interpolate(noise: Images, image: Images, t: Float[Tensor, " b"]) -> Images:
    """State x_t = t * image + (1 - t) * noise, with a time for every image of the batch."""
    return torch.lerp(noise, image, t.view(-1, 1, 1, 1))


def jump_to_image(x_t: Images, velocity: Images, t: Float[Tensor, " _"]) -> Images:
    """Where the straight path from x_t ends: x_t + (1 - t) * velocity; one time per image, or one for all."""
    return torch.addcmul(x_t, 1 - t.view(-1, 1, 1, 1), velocity)


def velocity_towards(image: Images, x_t: Images, t: Float[Tensor, " _"], *, shortest: float = 0.1) -> Images:
    """Velocity that leads from x_t to `image` in the time left, which is taken to be at least `shortest`."""
    return (image - x_t) / (1 - t).clamp(min=shortest).view(-1, 1, 1, 1)


def time_waves(t: Times, width: int) -> Float[Tensor, "n width"]:
    """Cosines, then sines, of 1000 t at width / 2 frequencies from 1 down to 1/10000 (exclusive).

    >>> time_waves(torch.tensor([0.0]), 4)
    tensor([[1., 1., 0., 0.]])
    """
    exponents = torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2)
    angles = 1000 * t.float()[:, None] * 10_000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
