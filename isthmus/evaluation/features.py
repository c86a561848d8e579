"""Frozen networks whose features images are compared on, run over many images.

An image goes in as the 8-bit values that are (or would be) written to a file, so a score of drawn images and a score of
the files are the same number. Everything streams, and only the features are kept.

DINOv2: Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", found distances on its features
nearer to people's judgement than those on Inception's. Inception-v3 is that of every published FID, through torch-
fidelity (extra `inception`).
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from isthmus.errors import UserError
from isthmus.files import sha256_of_file, write_whole
from isthmus.nn.perceptual import HEAD_WIDTH, TAP_CHANNELS, EfficientNetLite0, packaged_weights
from isthmus.nn.precision import whole_fp32
from isthmus.nn.stored_llama import no_progress_bars
from isthmus.pipelines.folder import model_folder
from isthmus.pipelines.memory import naming_next_batch_size
from isthmus.samples import GROUP, Samples

Rows = Float[np.ndarray, "_ d"]
Features = dict[str, Float[np.ndarray, "_ _"]]

FID_MIN_IMAGES = 10_000
"""Below this many samples nothing is called FID."""

FID_SIZE_PX = 299
"""Side to which images must have been resized by the network's own preprocessing for a FID."""


# the image processor that DINOv2 was published with: shorter side, central square, and the statistics of ImageNet
_RESIZED_PX, _CROP_PX = 256, 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# of the only file of Inception weights that is opened
_PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_INCEPTION, _LOGITS = "inception-2048", "inception-logits"

FEATURES = "features.npz"
"""What `sample_features` keeps, in the folder of the samples."""

_ROWS = "features/"
_PIXELS_AT_ONCE = 2**22
# images per forward of the network, whatever the batch of the draw: sums are rounded alike
_BATCH = 50


@dataclass(eq=False)
class FeatureNetwork:
    """A network, frozen, with all that a record says of it.

    Attributes:
        run: features by space, and those under `logits`, of images.
        name: "lite0", "inception" or "dinov2:<folder name>".
        spaces: name of every feature space -> its width; the first is the headline.
        preprocessing: what happens to 0..255 values before the network, in words.
        weights_sha256: of the weight file.
        input_size: side in pixels that every image is resized to; None where images keep theirs.
        logits: name of the output that an Inception score reads, or None.
    """

    run: Callable[[UInt8[Tensor, "b 3 h w"]], dict[str, Tensor]]
    _: KW_ONLY
    name: str
    spaces: dict[str, int]
    preprocessing: str
    weights_sha256: str
    device: torch.device
    input_size: int | None = None
    logits: str | None = None

    @property
    def headline(self) -> str:
        """The first space."""
        return next(iter(self.spaces))

    def __call__(self, images_uint8: UInt8[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b _"]]:
        """What `run` finds, in fp32 on the CPU."""
        with torch.inference_mode(), whole_fp32():
            found = self.run(images_uint8.to(self.device))
        # copied out of inference mode: tensors the caller may use anywhere
        return {name: rows.float().cpu().clone() for name, rows in found.items()}


def feature_network(spec: str = "lite0", *, device: str | torch.device = "cpu") -> FeatureNetwork:
    """The network that a command names.

    Args:
        spec: "lite0" (installed with the package), "inception:FILE" (weights of the FID Inception, in the extra
            `inception`) or "dinov2:FOLDER_OR_HUB_ID" (a DINOv2 that transformers saved).

    Raises:
        UserError: the name is none of these, the extra is missing, or the weights are not what they should be.

    >>> feature_network("lite0").spaces
    {'lite0-192': 192, 'lite0-1280': 1280}
    """
    kind, _, place = spec.partition(":")
    device = torch.device(device)
    if spec == "lite0":
        return _lite0(device)
    if kind == "inception" and place:
        return _inception(Path(place), device)
    if kind == "dinov2" and place:
        return _dinov2(place, device)
    raise UserError(
        f"features must be lite0, inception:FILE_OF_WEIGHTS or dinov2:FOLDER_OR_HUB_ID, got {spec!r}. "
        "lite0 is installed with this package."
    )


def _lite0(device: torch.device) -> FeatureNetwork:
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


def score_name(metric: Literal["frechet", "kernel"], space: str, num_images: int, input_size: int | None) -> str:
    """Name of a distance, after the features it was measured on.

    FID is one thing only: Frechet, on Inception features, of at least `FID_MIN_IMAGES` samples, with images resized to
    299 px by the network's own rule. KID is the kernel distance on the same features, at any number (it has no bias).
    Everything else carries the name of its features.

    >>> score_name("frechet", "lite0-192", 50_000, None), score_name("kernel", "lite0-192", 500, None)
    ('FD-lite0-192', 'KD-lite0-192')
    >>> score_name("frechet", "inception-2048", 50_000, 299), score_name("frechet", "inception-2048", 2_000, 299)
    ('FID', 'FD-inception-2048')
    """
    if space == _INCEPTION and input_size == FID_SIZE_PX and (metric == "kernel" or num_images >= FID_MIN_IMAGES):
        return "FID" if metric == "frechet" else "KID"
    return f"{'FD' if metric == 'frechet' else 'KD'}-{space}"


def _dinov2(place: str, device: torch.device) -> FeatureNetwork:
    """The network of a folder or hub id; an existing folder wins. It runs in fp32."""
    folder = model_folder(place)
    network = _dinov2_of(folder).to(device)
    width, short_name = int(network.config.hidden_size), Path(place).name
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    space = f"dinov2-{short_name}-{width}"

    def run(images_uint8: UInt8[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        pixels = _central_square(images_uint8)
        return {space: network(pixel_values=(pixels / 255 - mean) / std).pooler_output}

    digests = [sha256_of_file(path) for path in sorted(folder.glob("*.safetensors"))]
    joined = hashlib.sha256("".join(digests).encode()).hexdigest()
    return FeatureNetwork(
        run,
        name=f"dinov2:{short_name}",
        spaces={space: width},
        preprocessing=(
            f"shorter side to {_RESIZED_PX} px (bicubic, antialiased), central {_CROP_PX} px, v / 255 minus mean over "
            "deviation of ImageNet"
        ),
        weights_sha256=digests[0] if len(digests) == 1 else joined,
        device=device,
        input_size=_CROP_PX,
    )


def _central_square(images_uint8: UInt8[Tensor, "b 3 h w"]) -> Tensor:
    """Values 0..255 of the central square, in fp32."""
    height, width = images_uint8.shape[2:]
    scale = _RESIZED_PX / min(height, width)
    size = (round(height * scale), round(width * scale))
    # rounded to whole values, as the published processor resizes 8-bit pictures
    resized = F.interpolate(images_uint8.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (size[0] - _CROP_PX) // 2, (size[1] - _CROP_PX) // 2
    return resized[:, :, top : top + _CROP_PX, left : left + _CROP_PX]


def _dinov2_of(folder: Path) -> Any:
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


def _inception(path: Path, device: torch.device) -> FeatureNetwork:
    """Inception-v3 of every published FID. Nothing opens the weights before they are known to be the published ones."""
    if not path.is_file():
        raise UserError(f"Inception weights must be a file, but {path} is none. Check the path after inception:.")
    digest = sha256_of_file(path)
    if digest != _PUBLISHED_SHA256:
        raise UserError(
            f"Inception weights must be weights-inception-2015-12-05-6726825d.pth with SHA-256 {_PUBLISHED_SHA256}, "
            f"got {digest}. Scores on other weights compare with nothing; download the published file again."
        )
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
        return {_INCEPTION: features, _LOGITS: logits}

    return FeatureNetwork(
        run,
        name="inception",
        spaces={_INCEPTION: 2048},
        preprocessing="bilinear to 299 px as TensorFlow 1 does it, (v - 128) / 128 for v in 0..255",
        weights_sha256=digest,
        device=device,
        input_size=FID_SIZE_PX,
        logits=_LOGITS,
    )


def extract_features(
    network: FeatureNetwork, images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]], *, batch_size: int = 64
) -> Features:
    """Features of every image, one row each, by space (and the logits of networks that have them).

    An image's features do not depend on its neighbours in the batch, beyond the rounding of sums.

    Args:
        images_uint8: any iterable of (h, w, 3) arrays, all of one size, 0..255.
        batch_size: images per forward pass at most; of large images fewer, so that memory does not grow with them.

    Raises:
        UserError: images of two sizes, or memory ran out.
    """
    source, parts = iter(images_uint8), []
    first = next(source, None)
    if first is None:
        return {name: np.empty((0, width), np.float32) for name, width in network.spaces.items()}
    pixels = max(math.prod(first.shape[:2]), (network.input_size or 0) ** 2)
    size, source = min(batch_size, max(1, _PIXELS_AT_ONCE // pixels)), chain([first], source)
    while batch := list(islice(source, size)):
        if sizes := [image.shape[:2] for image in batch if image.shape != first.shape]:
            raise UserError(f"images must have one size, got {first.shape[:2]} and {sizes[0]}. Resize them first.")
        # its batches are its own: another --batch-size would change nothing
        with naming_next_batch_size(len(batch), advice="Free memory, or use --device cpu."):
            parts.append(network(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)))
    return _joined([{name: rows.numpy() for name, rows in part.items()} for part in parts])


def sample_features(network: FeatureNetwork, samples: Samples) -> Features:
    """Features of drawn images by space; those that an earlier call kept in `FEATURES` beside the images are read.

    They are of one network: another one's take their place.
    """
    hashes = np.array(samples.token_hashes)
    made_by = json.dumps(
        [network.name, network.weights_sha256, network.preprocessing, dict(samples.settings)], sort_keys=True
    )
    path = samples.folder / FEATURES
    known = _kept_features(path, made_by, hashes)
    start = len(next(iter(known.values()), ()))
    if start < len(samples):
        parts = [known] if start else []
        with tqdm(total=len(samples), initial=start, desc="features", unit="image", disable=None) as bar:
            for first in range(start, len(samples), GROUP):
                group = range(first, min(first + GROUP, len(samples)))
                parts.append(extract_features(network, map(samples.image, group), batch_size=_BATCH))
                bar.update(len(group))
        known = _joined(parts)
        arrays = {_ROWS + name: rows for name, rows in known.items()}
        write_whole(
            path,
            lambda file: np.savez(file, allow_pickle=False, made_by=np.array(made_by), token_ids=hashes, **arrays),
        )
    return known


def _joined(parts: list[Features]) -> Features:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _kept_features(path: Path, made_by: str, hashes: np.ndarray) -> Features:
    """Features that a file has of these images: of all of them, else of the leading whole groups."""
    try:
        # opened here: np.load leaves a broken archive open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if str(archive["made_by"]) != made_by:
                return {}
            theirs = archive["token_ids"][: len(hashes)]
            other = np.flatnonzero(theirs != hashes[: len(theirs)])
            count = int(other[0]) if len(other) else len(theirs)
            count -= count % GROUP if count < len(hashes) else 0
            return {name.removeprefix(_ROWS): archive[name][:count] for name in archive.files if _ROWS in name}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}
