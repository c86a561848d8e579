"""Our distances are those of the common implementation, given the same features."""

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from isthmus.evaluation.statistics import Gaussian, frechet_distance, squared_mmd


class Pixels(nn.Module):
    """Twelve values of a 2 x 2 image, in [0, 1]."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() / 255


@pytest.fixture
def sides() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 200, (60, 3, 2, 2), generator=generator, dtype=torch.uint8)
    return real, torch.randint(50, 256, (60, 3, 2, 2), generator=generator, dtype=torch.uint8)


def rows(images: torch.Tensor) -> np.ndarray:
    return Pixels()(images).double().numpy()


def test_the_frechet_distance(sides):
    metric = FrechetInceptionDistance(feature=Pixels())
    for images, real in zip(sides, (True, False), strict=True):
        metric.update(images, real=real)
    ours = frechet_distance(*(Gaussian.of(rows(images)) for images in sides))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_the_kernel_distance(sides):
    metric = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=60)
    for images, real in zip(sides, (True, False), strict=True):
        metric.update(images, real=real)
    assert squared_mmd(rows(sides[1]), rows(sides[0])) == pytest.approx(metric.compute()[0].item(), rel=1e-4)
