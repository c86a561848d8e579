"""Perceptual distances between images: EfficientNet-Lite0 taps (offline) and LPIPS on VGG16 (from the user's files).

Both compare deep features: each tap is scaled to unit length over its channels, the squared difference is averaged over
space and the taps are summed. LPIPS (Zhang et al., 2018) weighs the channels with learned factors first. Gradients flow
to the first image only; the second is the target.
"""

import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import UserError
from isthmus.models.efficientnet_lite import TAP_BLOCKS, EfficientNetLite0
from isthmus.models.saved_model import check_finite

logger = logging.getLogger(__name__)

# channels out of VGG16's 13 convolutions; a new row begins after each 2x2 max pooling, and its last output is a tap
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_LPIPS_SHIFT = (-0.030, -0.088, -0.188)
_LPIPS_SCALE = (0.458, 0.448, 0.450)


def unit_channels(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale the channel vector of every place to length 1; an all-zero vector stays zero, with a finite gradient."""
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


def tap_distance(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Squared difference of unit-length channel vectors, summed over channels, averaged over space."""
    return (unit_channels(a) - unit_channels(b)).square().sum(dim=1).mean(dim=(1, 2))


class Lite0Distance(nn.Module):
    """Perceptual distance on the taps of the frozen `EfficientNetLite0`; needs no download.

    `taps` are increasing block numbers; leaving out the last ones (14, 10) leaves out their computation. The distance
    is far more sensitive to faint noise than the eye, so give it a small weight beside a pixel loss.
    """

    def __init__(self, *, taps: Sequence[int] = TAP_BLOCKS, network: EfficientNetLite0 | None = None):
        super().__init__()
        self.chosen_taps = tuple(taps)
        self.network = EfficientNetLite0() if network is None else network

    def forward(self, images: Float[Tensor, "b 3 h w"], targets: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Distance of each image to its target, both in [-1, 1]; 0 for equal images."""
        with torch.no_grad():
            target_maps = self.network.taps(targets, self.chosen_taps)
        maps = self.network.taps(images, self.chosen_taps)
        return torch.stack([tap_distance(a, b) for a, b in zip(maps, target_maps, strict=True)]).sum(dim=0)


class LPIPSDistance(nn.Module):
    """LPIPS on VGG16 taps relu1_2, 2_2, 3_3, 4_3 and 5_3, with weights the user provides.

    `weights` maps torchvision's VGG16 names ``features.{0..28}.weight`` and ``.bias`` (13 convolutions) and LPIPS'
    ``lin{0..4}.model.1.weight`` of shape (1, channels, 1, 1) to tensors; `from_files` reads them. Raises `UserError`
    when one is missing, superfluous or of another shape. Frozen.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Mapping[str, Tensor]):
        super().__init__()
        self.convolutions = nn.ModuleList()
        channels = 3
        for row in _VGG16:
            for out_channels in row:
                self.convolutions.append(nn.Conv2d(channels, out_channels, 3, padding=1))
                channels = out_channels
        self.channel_weights = nn.ParameterList([torch.zeros(1, row[-1], 1, 1) for row in _VGG16])
        self.register_buffer("shift", torch.tensor(_LPIPS_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_LPIPS_SCALE)[:, None, None], persistent=False)
        self.load_state_dict(_lpips_state(weights, self.state_dict()))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_files(cls, *paths: Path) -> "LPIPSDistance":
        """Read the weights from one file that holds everything, or from several that hold it together.

        Understood are ``.safetensors`` and ``.pth``/``.pt`` (opened with ``weights_only=True``): torchvision's VGG16
        checkpoint (its ``classifier.*`` is left out, since LPIPS reads convolutions only) beside the LPIPS heads, and a
        saved LPIPS module (``net.slice*.N.*`` means ``features.N.*``; ``lins.*`` repeats ``lin*`` and
        ``scaling_layer.*`` are the constants above: both are left out). Raises `UserError` for anything else.
        """
        weights: dict[str, Tensor] = {}
        for path in paths:
            weights.update(_lpips_names(_read_tensors(path), path.name))
        return cls(weights)

    def taps(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """The five VGG16 maps of images in [-1, 1], at least 16 pixels a side; side halves from tap to tap."""
        x = (images - self.shift) / self.scale
        maps, layers = [], iter(self.convolutions)
        for row in _VGG16:
            if maps:
                x = F.max_pool2d(x, 2)
            for _ in row:
                x = F.relu(next(layers)(x))
            maps.append(x)
        return tuple(maps)

    def forward(self, images: Float[Tensor, "b 3 h w"], targets: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Distance of each image to its target, both in [-1, 1]; 0 for equal images."""
        with torch.no_grad():
            target_maps = self.taps(targets)
        total = images.new_zeros(images.shape[0])
        for a, b, weight in zip(self.taps(images), target_maps, self.channel_weights, strict=True):
            squared = (unit_channels(a) - unit_channels(b)).square()
            total = total + (squared * weight).sum(dim=1).mean(dim=(1, 2))
        return total


def perceptual_distance(
    kind: Literal["lite0", "lpips"], *, lpips_weights: Sequence[Path] = (), taps: Sequence[int] = TAP_BLOCKS
) -> Lite0Distance | LPIPSDistance:
    """Build the distance a run names: `lite0` needs nothing, `lpips` the user's weight files. Raises `UserError`."""
    if kind == "lite0":
        if lpips_weights:
            raise UserError("LPIPS weights belong to the lpips distance, got them with lite0. Ask for lpips.")
        return Lite0Distance(taps=taps)
    if not lpips_weights:
        raise UserError(
            "the lpips distance needs weight files, got none. Give a file with VGG16's features.* and LPIPS' "
            "lin0..lin4, or choose lite0, which is installed with this package."
        )
    return LPIPSDistance.from_files(*lpips_weights)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"LPIPS weights must be a file, but {path} is none. Give a .safetensors or .pth file.")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    unreadable = (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError)
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except unreadable as error:
        raise UserError(
            f"LPIPS weights must be tensors by name, but {path.name} cannot be read ({type(error).__name__}). "
            "It may be truncated, or hold more than tensors: save a plain state dict."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"LPIPS weights must be tensors by name, {path.name} holds other things. Save a state dict.")
    check_finite(state, path)
    return dict(state)


def _lpips_names(state: Mapping[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """Rename a saved LPIPS module's keys to the documented ones; drop, and say so, what the distance does not read."""
    kept, dropped = {}, []
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] in ("classifier", "lins", "scaling_layer"):
            dropped.append(key)
        elif parts[0] == "net" and len(parts) == 4:  # net.slice2.5.weight
            kept[f"features.{parts[2]}.{parts[3]}"] = value
        else:
            kept[key] = value
    if dropped:
        logger.info("%s: %d weights that LPIPS does not read are left out: %s", file_name, len(dropped), dropped)
    return kept


def _lpips_state(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the documented names, every one of them accounted for and of the right shape."""
    names: dict[str, str] = {}
    published = count = 0
    for row in _VGG16:
        for _ in row:
            for part in ("weight", "bias"):
                names[f"convolutions.{count}.{part}"] = f"features.{published}.{part}"
            count, published = count + 1, published + 2  # a convolution and its ReLU
        published += 1  # the max pooling
    names |= {f"channel_weights.{index}": f"lin{index}.model.1.weight" for index in range(len(_VGG16))}

    missing = [theirs for theirs in names.values() if theirs not in weights]
    unexpected = sorted(set(weights) - set(names.values()))
    present = [(ours, theirs) for ours, theirs in names.items() if theirs in weights]
    wrong = [
        f"{theirs} {tuple(weights[theirs].shape)}"
        for ours, theirs in present
        if weights[theirs].shape != own[ours].shape
    ]
    if missing or unexpected or wrong:
        raise UserError(
            "LPIPS needs features.{0..28}.weight/bias of VGG16 and lin{0..4}.model.1.weight. "
            f"Missing {len(missing)} (first: {missing[:3]}), unknown {len(unexpected)} (first: {unexpected[:3]}), "
            f"of another shape {len(wrong)} (first: {wrong[:3]}). Give the VGG16 file and the LPIPS heads together."
        )
    return {ours: weights[theirs].float() for ours, theirs in names.items()}
