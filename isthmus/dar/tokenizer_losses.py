"""The objective of the diffusion tokenizer: flow matching, codebook, and alignment with frozen features (REPA).

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1 (spec of D-AR, 1.3, 1.6 and 1.9). Noise
and noise levels of a batch are pure functions of (seed, position), whatever the batch or the process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.dar.runs import DiffusionTokenizerLoss
from isthmus.dar.tokenizer import DiffusionTokenizerOutput
from isthmus.errors import UserError
from isthmus.nn.draws import FLOW_TIME, NOISE, stream
from isthmus.nn.perceptual import EfficientNetLite0, unit_channels
from isthmus.nn.shapes import Images

_UNIFORM, _BALANCED = 0, 1


def raw_times(
    positions: Int[Tensor, " b"],
    num_levels: int,
    *,
    kind: Literal["uniform", "balanced"],
    num_groups: int,
    latest: float = 1.0,
    seed: int,
) -> Float[Tensor, "b k"]:
    """Raw times of training positions, in fp32.

    uniform: over [0, latest). A group answers for the times nearest to its own (g / G), so the first of G groups gets
    half a share and the last one and a half (spec of D-AR, 1.6).

    balanced: any G noise levels in a row, beginning at a multiple of G, visit every group once, in random order; within
    its group's times a level is uniform. Raises UserError as `group_spans`.
    """
    numbers = [int(position) for position in positions]
    if kind == "uniform":
        rows = [latest * stream(seed, FLOW_TIME, _UNIFORM, number).random(num_levels) for number in numbers]
        return torch.from_numpy(np.stack(rows)).float()
    spans = group_spans(num_groups, latest)
    orders: dict[int, np.ndarray] = {}
    times = np.empty((len(numbers), num_levels))
    for row, number in enumerate(numbers):
        shares = stream(seed, FLOW_TIME, _UNIFORM, number).random(num_levels)
        for level, share in enumerate(shares):
            block, place = divmod(number * num_levels + level, num_groups)
            if block not in orders:
                orders[block] = stream(seed, FLOW_TIME, _BALANCED, block).permutation(num_groups)
            low, high = spans[orders[block][place]]
            times[row, level] = low + (high - low) * share
    return torch.from_numpy(times).float()


def group_spans(num_groups: int, latest: float = 1.0) -> list[tuple[float, float]]:
    """Raw times [low, high) that each group answers for: those that round to it, up to `latest`.

    Raises UserError where `latest` leaves the last group nothing.

    >>> group_spans(4)
    [(0.0, 0.125), (0.125, 0.375), (0.375, 0.625), (0.625, 1.0)]
    """
    edges = [0.0, *((g + 0.5) / num_groups for g in range(num_groups - 1)), latest]
    if edges[-2] >= latest:
        raise UserError(
            f"loss.latest_time must be more than {edges[-2]:.4g}, where the last of {num_groups} groups begins, got "
            f"{latest}. Raise it, or draw the times uniformly."
        )
    return list(pairwise(edges))


def training_noise(
    positions: Int[Tensor, " b"],
    num_levels: int,
    image_shape: tuple[int, int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "b k 3 h w"]:
    """Standard normal noise of training positions, drawn on the device; a row depends on its own position only."""
    generator = torch.Generator(device)
    rows = []
    for position in positions:
        generator.manual_seed(int(stream(seed, NOISE, int(position)).integers(2**63)))
        rows.append(torch.randn(num_levels, 3, *image_shape, generator=generator, device=device))
    return torch.stack(rows)


# places per side of a DINOv2 map, whatever the image: 224 px at the published patch of 14
_DINO_GRID = 16
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Lite0Features(nn.Module):
    """Taps of `EfficientNetLite0`, each of unit length over its channels, on the grid of the finest (the first)."""

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
    Raises UserError where the folder holds no DINOv2, or not all of its weights as safetensors.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path):
        super().__init__()
        self.network = _load_dino(folder)
        # rows that are no patches: class and registers
        self.num_extra = 1 + int(getattr(self.network.config, "num_register_tokens", 0))
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
    """The network that a run aligns with; UserError where its files do not fit."""
    if config.alignment_network == "lite0":
        return Lite0Features(config.alignment_taps)
    assert config.alignment_folder is not None, "the run checks that it is given"
    return DINOv2Features(config.alignment_folder).requires_grad_(False).eval()


@torch.no_grad()
def feature_shape(network: nn.Module, image_size: int) -> tuple[int, int]:
    """Channels and side of the map that a frozen network gives of a square image."""
    features = network(torch.zeros(1, 3, image_size, image_size))
    return features.shape[1], features.shape[2]


def _load_dino(folder: Path) -> Any:
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
    return network


@dataclass
class DiffusionTrainingOutput:
    """What one pass of tokenizer and decoder gives; row i * k + j of `rows` is noise level j of image i.

    What was left out is None: alignment, readout, a canvas.
    """

    velocity: Float[Tensor, "rows 3 h w"]
    target: Float[Tensor, "rows 3 h w"]
    jump: Float[Tensor, "rows 3 h w"]
    """The image that one straight step to the end would give."""
    encoded: DiffusionTokenizerOutput
    ends: Int[Tensor, "b k"]
    """Number of tokens up to the end of the window that drives each noise level."""
    aligned: Float[Tensor, "rows c r r"] | None = None
    """Inner features of the decoder as the frozen network's."""
    readout: Float[Tensor, "b groups 3 s s"] | None = None
    """Small images read off the first groups of tokens."""
    canvas: Float[Tensor, "rows 3 h w"] | None = None
    """What the tokens so far have painted, as images."""


def diffusion_losses(
    output: DiffusionTrainingOutput,
    images: Images,
    config: DiffusionTokenizerLoss,
    *,
    data_std: float,
    counted_tokens: Float[Tensor, ""] | None = None,
    distance: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Losses of one part of a batch, images in [-1, 1]; those under `weighted/` add up to what is minimised.

    Args:
        counted_tokens: what the codebook errors are divided by; None takes the tokens that this part counts. With
            several parts or processes it is the mean over all of them, so that all together give the loss of the whole.
        distance: perceptual distance, where it has a weight.
        teacher: frozen features, where alignment has a weight.
    """
    levels = output.ends.shape[1]
    repeated = images.repeat_interleave(levels, dim=0)
    # the jump is measured even where it is not trained on: its error is what one sees of a diffusion's progress
    losses = {"flow": F.mse_loss(output.velocity, output.target), "jump": F.mse_loss(output.jump, repeated)}
    losses["flow"] = losses["flow"] / data_std**2  # measured in images, not in states
    losses["weighted/flow"] = config.flow * losses["flow"]
    if config.jump:
        losses["weighted/jump"] = config.jump * losses["jump"]
    if output.encoded.token_ids is not None:
        for name in ("codebook", "commitment"):
            losses[name] = prefix_mean(getattr(output.encoded, f"{name}_errors"), output.ends, counted_tokens)
            losses[f"weighted/{name}"] = getattr(config, name) * losses[name]
    if distance is not None:
        losses["perceptual"] = distance(output.jump, repeated).mean()
        losses["weighted/perceptual"] = config.perceptual * losses["perceptual"]
    if output.aligned is not None and teacher is not None:
        losses["alignment"] = alignment_loss(output.aligned, teacher(images).repeat_interleave(levels, dim=0))
        losses["weighted/alignment"] = config.alignment * losses["alignment"]
    if output.canvas is not None:
        losses["canvas"] = F.mse_loss(output.canvas, repeated)
        if config.canvas:
            losses["weighted/canvas"] = config.canvas * losses["canvas"]
    if output.readout is not None:
        losses["readout"] = readout_loss(output.readout, images)
        losses["weighted/readout"] = config.readout * losses["readout"]
    return losses


def prefix_mean(
    errors: Float[Tensor, "b n"], ends: Int[Tensor, "b k"], counted_tokens: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Mean over the tokens before `ends`, each level of an image counting its own: later tokens did nothing there.

    >>> prefix_mean(torch.tensor([[1.0, 5.0], [3.0, 7.0]]), torch.tensor([[1], [2]]))
    tensor(3.6667)
    """
    counts = (torch.arange(errors.shape[1], device=errors.device) < ends.unsqueeze(-1)).sum(dim=1)
    return (counts * errors).sum() / (counts.sum() if counted_tokens is None else counted_tokens)


def alignment_loss(
    projected: Float[Tensor, "rows c r r"], features: Float[Tensor, "rows c rows_in columns_in"]
) -> Float[Tensor, ""]:
    """1 - cosine over channels, mean over places (REPA, Yu et al. 2024); features are averaged to the same grid."""
    features = F.adaptive_avg_pool2d(features, (projected.shape[-2], projected.shape[-1]))
    return 1 - F.cosine_similarity(projected.float(), features.float(), dim=1).mean()


def readout_loss(readout: Float[Tensor, "b groups 3 s s"], images: Images) -> Float[Tensor, ""]:
    """Squared error of every number of groups' small image; the target is the image averaged to that size."""
    target = F.adaptive_avg_pool2d(images, (readout.shape[-2], readout.shape[-1])).unsqueeze(1)
    return F.mse_loss(readout.float(), target.expand_as(readout))
