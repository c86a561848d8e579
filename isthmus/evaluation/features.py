"""Frozen networks whose features images are compared on, run over many images.

An image goes in as the 8-bit values that are (or would be) written to a file, so a score of drawn images and a score of
the files are the same number. Everything streams, and only the features are kept.

DINOv2: Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", found distances on its features
nearer to people's judgement than those on Inception's. Inception-v3 is that of every published FID, through torch-
fidelity (extra `inception`).
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

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
from isthmus.pipelines.memory import is_out_of_memory
from isthmus.samples import GROUP, Samples

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
        return inception_network(Path(place), device)
    if kind == "dinov2" and place:
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


_PIXELS_AT_ONCE = 2**22


def extract_features(
    network: FeatureNetwork, images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]], *, batch_size: int = 64
) -> dict[str, Float[np.ndarray, "n _"]]:
    """Features of every image, one row each, by space (and the logits of networks that have them).

    An image's features do not depend on its neighbours in the batch, beyond the rounding of sums.

    Args:
        network: from `feature_network`.
        images_uint8: an array (n, h, w, 3) or any iterable of (h, w, 3) arrays, all of one size, 0..255.
        batch_size: images per forward pass at most; of large images fewer, so that memory does not grow with them.

    Raises:
        UserError: images of two sizes, or memory ran out.
    """
    parts: dict[str, list[np.ndarray]] = {}
    source = iter(images_uint8)
    first = list(islice(source, 1))
    size = min(batch_size, images_at_once(network, first[0].shape[:2])) if first else batch_size
    source = chain(first, source)
    while batch := list(islice(source, size)):
        if len({image.shape for image in batch}) > 1:
            sizes = sorted({image.shape[:2] for image in batch})
            raise UserError(f"images must have one size, got {sizes[:3]}. Resize them first.")
        for name, rows in _features(network, np.stack(batch)).items():
            parts.setdefault(name, []).append(rows.numpy())
    if not parts:
        return {name: np.empty((0, width), np.float32) for name, width in network.spaces.items()}
    return {name: np.concatenate(rows) for name, rows in parts.items()}


FEATURES = "features.npz"
"""What `sample_features` keeps, in the folder of the samples."""

# images per forward of the network, whatever the batch of the draw: sums are rounded alike
_BATCH = 50


def sample_features(network: FeatureNetwork, samples: Samples) -> dict[str, Float[np.ndarray, "n _"]]:
    """Features of drawn images by space, from their pictures; those that an earlier call kept are read.

    They are kept in `FEATURES` beside the images, of one network: another one's take their place.
    """
    hashes = np.array([row["token_ids_sha256"] for row in samples.rows])
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
        known = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays = {_ROWS + name: rows for name, rows in known.items()}
        write_whole(
            path,
            lambda file: np.savez(file, allow_pickle=False, made_by=np.array(made_by), token_ids=hashes, **arrays),
        )
    return known


_ROWS = "features/"


def _kept_features(path: Path, made_by: str, hashes: np.ndarray) -> dict[str, Float[np.ndarray, "n _"]]:
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


def images_at_once(network: FeatureNetwork, size: tuple[int, ...]) -> int:
    """How many images of `size` pixels (height, width) a network is given at once, at least one.

    >>> from isthmus.evaluation.features import feature_network
    >>> lite0 = feature_network("lite0")
    >>> images_at_once(lite0, (256, 256)), images_at_once(lite0, (4096, 4096))
    (64, 1)
    """
    height, width = size
    return max(1, _PIXELS_AT_ONCE // max(height * width, (network.input_size or 0) ** 2))


def _features(network: FeatureNetwork, images: UInt8[np.ndarray, "b h w 3"]) -> dict[str, torch.Tensor]:
    try:
        return network(torch.from_numpy(images).permute(0, 3, 1, 2))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        count, height, width, _ = images.shape
        raise UserError(
            f"memory ran out in the feature network {network.name} on {count} image(s) of {height} x {width} px. Free "
            f"memory on {network.device.type}{', or use --device cpu' if network.device.type != 'cpu' else ''}."
        ) from error
