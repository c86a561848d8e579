"""Inception-v3 with the weights behind every published FID, through torch-fidelity (extra `inception`).

The weights are those of TensorFlow's inception-2015-12-05 graph, ported to PyTorch: the file
``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity's release v0.2.0, and the same bytes as
``pt_inception-2015-12-05-6726825d.pth`` of pytorch-fid. The file name carries the first eight hex digits of the
SHA-256, which torch.hub checks on download. The whole hash below is the one that several public repositories record for
the file they used (one of them as the checksum of that very download); we had no copy to hash ourselves.
"""

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from isthmus.data.cache import sha256_of_file
from isthmus.errors import UserError
from isthmus.evaluation.feature_networks import FID_SIZE_PX, FeatureNetwork

PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""Of the only file that is opened."""

_FEATURES, _LOGITS = "inception-2048", "inception-logits"


def checked_weights(path: Path) -> str:
    """Hash of the weight file, which nothing opens before it is known to be the published one.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    if not path.is_file():
        raise UserError(f"Inception weights must be a file, but {path} is none. Check the path after inception:.")
    found = sha256_of_file(path)
    if found != PUBLISHED_SHA256:
        raise UserError(
            f"Inception weights must be weights-inception-2015-12-05-6726825d.pth with SHA-256 {PUBLISHED_SHA256}, "
            f"got {found}. Scores on other weights compare with nothing; download the published file again."
        )
    return found


def inception_network(path: Path, device: torch.device) -> FeatureNetwork:
    """Pooled 2,048-wide features and the logits without bias, as FID and Inception score take them.

    Raises:
        UserError: the file is not the published one, or the extra is not installed.
    """
    digest = checked_weights(path)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]  extra
            FeatureExtractorInceptionV3,
        )
    except ImportError as error:
        raise UserError(
            "Inception features need torch-fidelity and the torchvision that fits torch, which are not installed. "
            "Run `pip install isthmus[inception]` in an environment of its own, or use --features lite0."
        ) from error
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    ).to(device)
    # torch-fidelity's constructor does so too; dropout and batch statistics must be off whatever it does
    network.eval()

    def run(images_uint8: UInt8[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        features, logits = network(images_uint8)
        return {_FEATURES: features, _LOGITS: logits}

    return FeatureNetwork(
        run,
        name="inception",
        spaces={_FEATURES: 2048},
        preprocessing="bilinear to 299 px as TensorFlow 1 does it, (v - 128) / 128 for v in 0..255",
        weights_sha256=digest,
        device=device,
        input_size=FID_SIZE_PX,
        logits=_LOGITS,
    )
