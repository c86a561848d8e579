"""How far an image is from another, in decibels."""

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.functional.shapes import Images


def psnr(images: Images, targets: Images) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each image, for values in [-1, 1] (peak-to-peak 2).

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.2)).round(decimals=3)
    tensor([20.])
    """
    mse = (images - targets).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))
