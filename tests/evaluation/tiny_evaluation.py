"""Features that a test can work out by hand."""

import torch

from isthmus.evaluation.features import FeatureNetwork


def mean_colour(weights_sha256: str = "") -> FeatureNetwork:
    """A feature network of three numbers."""
    return FeatureNetwork(
        lambda images: {"colour": images.float().mean(dim=(2, 3))},
        name="colour",
        spaces={"colour": 3},
        preprocessing="none",
        weights_sha256=weights_sha256,
        device=torch.device("cpu"),
    )
