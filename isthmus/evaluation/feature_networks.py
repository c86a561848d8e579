"""Frozen networks whose features images are compared on: one call for all of them, and the names of their scores.

An image goes in as the 8-bit values that are (or would be) written to a file, so a score of drawn images and a score of
the files are the same number. `features.py` runs a network over many images.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from isthmus.data.cache import sha256_of_file
from isthmus.errors import UserError
from isthmus.functional.precision import whole_fp32
from isthmus.models.efficientnet_lite import HEAD_WIDTH, TAP_CHANNELS, EfficientNetLite0, packaged_weights

FID_MIN_IMAGES = 10_000
"""Below this many samples nothing is called FID."""

FID_SIZE_PX = 299
"""Side to which images must have been resized by the network's own preprocessing for a FID."""


class FeatureNetwork:
    """A network, frozen, with all that a record says of it.

    Attributes:
        name: "lite0", "inception" or "dinov2:<folder name>".
        spaces: name of every feature space -> its width; the first is the headline space.
        logits: name of the output that an Inception score reads, or None.
        preprocessing: what happens to 0..255 values before the network, in words.
        input_size: side in pixels that every image is resized to; None where images keep theirs.
        weights_sha256: hash of the weight file.
    """

    def __init__(
        self,
        run: Callable[[UInt8[Tensor, "b 3 h w"]], dict[str, Tensor]],
        *,
        name: str,
        spaces: dict[str, int],
        preprocessing: str,
        weights_sha256: str,
        device: torch.device,
        input_size: int | None = None,
        logits: str | None = None,
    ):
        self.name, self.spaces, self.preprocessing = name, spaces, preprocessing
        self.weights_sha256, self.input_size, self.logits = weights_sha256, input_size, logits
        self.device = device
        self._run = run

    def __call__(self, images_uint8: UInt8[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """Features in fp32 on the CPU: one entry per space, and one named `logits` where there are any."""
        with torch.inference_mode(), whole_fp32():
            found = self._run(images_uint8.to(self.device))
        # copied out of inference mode: tensors the caller may use anywhere
        return {name: rows.float().cpu().clone() for name, rows in found.items()}


def feature_network(spec: str = "lite0", *, device: str | torch.device = "cpu") -> FeatureNetwork:
    """The network that a command names.

    Args:
        spec: "lite0" (installed with the package), "inception:FILE" (weights of the FID Inception, in the extra
            `inception`) or "dinov2:FOLDER_OR_HUB_ID" (a DINOv2 that transformers saved).
        device: where it runs.

    Raises:
        UserError: the name is none of these, the extra is missing, or the weights are not what they should be.

    >>> feature_network("lite0").spaces
    {'lite0-192': 192, 'lite0-1280': 1280}
    """
    kind, _, place = spec.partition(":")
    device = torch.device(device)
    if spec == "lite0":
        return lite0_network(device)
    if kind == "inception" and place:
        from isthmus.evaluation.inception_network import inception_network

        return inception_network(Path(place), device)
    if kind == "dinov2" and place:
        from isthmus.evaluation.dinov2_network import dinov2_network

        return dinov2_network(place, device)
    raise UserError(
        f"features must be lite0, inception:FILE_OF_WEIGHTS or dinov2:FOLDER_OR_HUB_ID, got {spec!r}. "
        "lite0 is installed with this package."
    )


def lite0_network(device: torch.device) -> FeatureNetwork:
    """EfficientNet-Lite0 at the images' own size: its last tap averaged over space, and its pooled head."""
    network = EfficientNetLite0().to(device)

    def run(images_uint8: UInt8[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        features = network.features(images_uint8.float() / 127.5 - 1)
        return {middle: features.taps[-1].mean(dim=(2, 3)), head: features.pooled}

    middle, head = f"lite0-{TAP_CHANNELS[-1]}", f"lite0-{HEAD_WIDTH}"
    return FeatureNetwork(
        run,
        name="lite0",
        spaces={middle: TAP_CHANNELS[-1], head: HEAD_WIDTH},
        preprocessing="native size, (v - 127) / 128 for v in 0..255",
        weights_sha256=sha256_of_file(packaged_weights()),
        device=device,
    )


def score_name(metric: str, space: str, num_images: int, input_size: int | None) -> str:
    """Name of a distance, after the features it was measured on.

    FID is one thing only: Frechet, on Inception features, of at least `FID_MIN_IMAGES` samples, with images resized to
    299 px by the network's own rule. KID is the kernel distance on the same features, at any number (it has no bias).
    Everything else carries the name of its features.

    Args:
        metric: "frechet" or "kernel".
        space: a key of `FeatureNetwork.spaces`.
        num_images: samples that were measured.
        input_size: `FeatureNetwork.input_size`.

    Raises:
        UserError: another metric.

    >>> score_name("frechet", "lite0-192", 50_000, None), score_name("kernel", "lite0-192", 500, None)
    ('FD-lite0-192', 'KD-lite0-192')
    >>> score_name("frechet", "inception-2048", 50_000, 299), score_name("frechet", "inception-2048", 2_000, 299)
    ('FID', 'FD-inception-2048')
    """
    if metric not in ("frechet", "kernel"):
        raise UserError(f"metric must be frechet or kernel, got {metric!r}.")
    if metric == "frechet" and space == "inception-2048" and num_images >= FID_MIN_IMAGES and input_size == FID_SIZE_PX:
        return "FID"
    if metric == "kernel" and space == "inception-2048" and input_size == FID_SIZE_PX:
        return "KID"
    return f"{'FD' if metric == 'frechet' else 'KD'}-{space}"
