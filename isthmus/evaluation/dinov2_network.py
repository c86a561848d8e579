"""DINOv2 through transformers: the class token after the last norm, for images of any size.

Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", found distances on these features nearer to
people's judgement than those on Inception's.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from isthmus.data.cache import sha256_of_file
from isthmus.errors import UserError
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.models.stored_llama import no_progress_bars
from isthmus.pipelines.hub import model_folder

# the image processor that DINOv2 was published with: shorter side, central square, and the statistics of ImageNet
_RESIZED_PX, _CROP_PX = 256, 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2_network(place: str, device: torch.device) -> FeatureNetwork:
    """The network of a folder or hub id; an existing folder wins. It runs in fp32.

    Raises:
        UserError: there is no DINOv2, or not all of its weights as safetensors.
    """
    folder = model_folder(place)
    network = _load(folder).to(device)
    width, short_name = int(network.config.hidden_size), Path(place).name
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    space = f"dinov2-{short_name}-{width}"

    def run(images_uint8: UInt8[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        pixels = _prepared(images_uint8)
        return {space: network(pixel_values=(pixels / 255 - mean) / std).pooler_output}

    return FeatureNetwork(
        run,
        name=f"dinov2:{short_name}",
        spaces={space: width},
        preprocessing=(
            f"shorter side to {_RESIZED_PX} px (bicubic, antialiased), central {_CROP_PX} px, v / 255 minus mean over "
            "deviation of ImageNet"
        ),
        weights_sha256=_hash_of(sorted(folder.glob("*.safetensors"))),
        device=device,
        input_size=_CROP_PX,
    )


def _prepared(images_uint8: UInt8[Tensor, "b 3 h w"]) -> Tensor:
    """Values 0..255 of the central square, in fp32."""
    height, width = images_uint8.shape[2:]
    scale = _RESIZED_PX / min(height, width)
    size = (round(height * scale), round(width * scale))
    # rounded to whole values, as the published processor resizes 8-bit pictures
    resized = F.interpolate(images_uint8.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (size[0] - _CROP_PX) // 2, (size[1] - _CROP_PX) // 2
    return resized[:, :, top : top + _CROP_PX, left : left + _CROP_PX]


def _load(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # transformers' words for a folder without a usable config.json
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error
    if config.model_type not in ("dinov2", "dinov2_with_registers"):
        raise UserError(f"dinov2: needs a DINOv2, {folder} is a {config.model_type}. Choose another folder.")
    try:
        with no_progress_bars():
            network, report = AutoModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except OSError as error:
        raise _unusable(folder, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"the DINOv2 in {folder} lacks {len(missing)} weights (first: {missing[:3]}). Copy it again.")
    return network.requires_grad_(False).eval()


def _unusable(folder: Path, error: Exception) -> UserError:
    first = str(error).strip().splitlines()[0]
    return UserError(
        f"dinov2: needs a folder with config.json and safetensors, got {folder} ({first}). Save the network again with "
        "transformers."
    )


def _hash_of(files: list[Path]) -> str:
    """Hash of a file; of several, the hash of their hashes in the order of their names."""
    digests = [sha256_of_file(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
