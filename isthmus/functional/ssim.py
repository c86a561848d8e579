"""Structural similarity of two images."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.shapes import Images

_WINDOW_PX, _DEVIATION_PX = 11, 1.5
# (0.01 L)^2 and (0.03 L)^2 for values of range L = 2
_C1, _C2 = 0.02**2, 0.06**2


def ssim(images: Images, targets: Images) -> Float[Tensor, " b"]:
    """Mean SSIM over places and channels of each image, for values in [-1, 1]; 1 for equal images.

    Source: Wang et al. 2004, "Image Quality Assessment", equation 13, with its Gaussian window of 11 x 11 pixels and
    deviation 1.5, at the places where the window lies inside the image.

    Raises:
        UserError: images of different shapes, or smaller than the window.

    >>> ssim(torch.zeros(1, 3, 11, 11), torch.zeros(1, 3, 11, 11))
    tensor([1.])
    """
    if images.shape != targets.shape or min(images.shape[2:]) < _WINDOW_PX:
        raise UserError(
            f"SSIM needs two images of one size of at least {_WINDOW_PX} px, got {tuple(images.shape)} and "
            f"{tuple(targets.shape)}."
        )
    # float64: variances are differences of nearly equal numbers
    x, y = images.double(), targets.double()
    mean_x, mean_y, xx, yy, xy = (_windowed(one) for one in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3)).float()


def _windowed(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _ _"]:
    """Averages under the Gaussian window, where it fits."""
    places = torch.arange(_WINDOW_PX, device=maps.device, dtype=maps.dtype) - _WINDOW_PX // 2
    line = torch.exp(-0.5 * (places / _DEVIATION_PX) ** 2)
    line = line / line.sum()
    channels = maps.shape[1]
    columns, rows = (line.view(shape).expand(channels, -1, -1, -1) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    return F.conv2d(F.conv2d(maps, columns, groups=channels), rows, groups=channels)
