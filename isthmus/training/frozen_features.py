"""Frozen networks whose features the decoder's are aligned with (REPA): EfficientNet-Lite0, or a DINOv2 of the user's.

Both give one map of features per image, square grids of places.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.functional.shapes import Images
from isthmus.models.efficientnet_lite import EfficientNetLite0
from isthmus.models.perceptual import unit_channels
from isthmus.training.dar_config import DiffusionTokenizerLoss

# places per side of a DINOv2 map, whatever the image: 224 px at the published patch of 14
_DINO_GRID = 16
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Lite0Features(nn.Module):
    """Taps of `EfficientNetLite0`, each of unit length over its channels, on the grid of the finest one.

    Args:
        taps: increasing block numbers.
    """

    def __init__(self, taps: Sequence[int]):
        super().__init__()
        self.chosen_taps = tuple(taps)
        self.network = EfficientNetLite0()

    @torch.no_grad()
    def forward(self, images: Images) -> Float[Tensor, "b c r s"]:
        """Features of images in [-1, 1]."""
        maps = [unit_channels(tap) for tap in self.network.taps(images.float(), self.chosen_taps)]
        return torch.cat([F.interpolate(one, maps[0].shape[-2:]) for one in maps], dim=1)


class DINOv2Features(nn.Module):
    """Normalised patch features of a DINOv2 that `transformers` saved in a folder; nothing is downloaded.

    The image goes in as 16 x 16 patches (224 px where they are 14 wide), resized bicubically without antialiasing.

    Raises:
        UserError: the folder holds no DINOv2, or not all of its weights as safetensors.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path):
        super().__init__()
        self.network, self.num_extra = _load_dino(folder)
        self.side = _DINO_GRID * int(self.network.config.patch_size)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Images) -> Float[Tensor, "b c r s"]:
        """Features of images in [-1, 1]."""
        normalized = ((images.float() + 1) / 2 - self.mean) / self.std
        resized = F.interpolate(normalized, (self.side, self.side), mode="bicubic")
        rows = self.network(pixel_values=resized).last_hidden_state[:, self.num_extra :]
        return rows.transpose(1, 2).unflatten(2, (_DINO_GRID, _DINO_GRID))


def frozen_features(config: DiffusionTokenizerLoss) -> nn.Module:
    """The network that a run aligns with. Raises `UserError` where its files do not fit."""
    if config.alignment_network == "lite0":
        return Lite0Features(config.alignment_taps)
    assert config.alignment_folder is not None, "the run checks that it is given"
    return DINOv2Features(config.alignment_folder).requires_grad_(False).eval()


@torch.no_grad()
def feature_shape(network: nn.Module, image_size: int) -> tuple[int, int]:
    """Channels and side of the map that a frozen network gives of a square image."""
    features = network(torch.zeros(1, 3, image_size, image_size))
    return features.shape[1], features.shape[2]


def _load_dino(folder: Path) -> tuple[Any, int]:
    """The network and its number of rows that are no patches (class and registers)."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"loss.alignment_folder must hold a DINOv2 saved by transformers, got {folder}. Check the path."
        )
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in ("dinov2", "dinov2_with_registers"):
        raise UserError(f"loss.alignment_folder must hold a DINOv2, got a {config.model_type}. Choose another folder.")
    try:
        network, report = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except OSError as error:
        raise UserError(
            f"{folder} has no weights as safetensors ({error}). Save the network again with transformers."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"the DINOv2 in {folder} lacks {len(missing)} weights (first: {missing[:3]}). Copy it again.")
    return network, 1 + int(getattr(config, "num_register_tokens", 0))
