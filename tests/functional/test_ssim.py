import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.nn.perceptual import ssim


def test_it_is_the_published_index():
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 20, 17, generator=generator) * 2 - 1
    targets = (images + 0.2 * torch.randn(2, 3, 20, 17, generator=generator)).clamp(-1, 1)
    expected = [
        structural_similarity(
            a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=2, gaussian_weights=True,
            sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(images, targets, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(ssim(images, targets).numpy(), expected, rtol=1e-5)


def test_two_flat_images_by_hand():
    # no variance: only (2 m n + c) / (m^2 + n^2 + c) with c = 0.02^2 is left
    a, b = torch.full((1, 3, 12, 12), 0.5), torch.full((1, 3, 12, 12), -0.1)
    torch.testing.assert_close(ssim(a, b), torch.tensor([(-0.1 + 4e-4) / (0.25 + 0.01 + 4e-4)]))


def test_images_smaller_than_the_window_are_refused():
    with pytest.raises(UserError, match="at least 11 px"):
        ssim(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 10, 12))
