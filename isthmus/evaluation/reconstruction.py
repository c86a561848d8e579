"""How much of an image its tokens keep: PSNR, SSIM, perceptual distance and the Frechet distance of reconstructions.

Everything is measured on 8-bit values, as they would be written to files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from isthmus.errors import UserError
from isthmus.evaluation.degradations import ruined
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.reconstruction_stages import reconstruction_with_steps, reconstructions_by_stage
from isthmus.evaluation.statistics import Gaussian, frechet_distance
from isthmus.functional.precision import whole_fp32
from isthmus.functional.psnr import psnr
from isthmus.functional.shapes import Images
from isthmus.functional.ssim import ssim
from isthmus.models.perceptual import Lite0Distance, LPIPSDistance
from isthmus.pipelines.loading import AnyPipeline

if TYPE_CHECKING:
    from isthmus.pipelines.dar import DARPipeline

Pictures = UInt8[np.ndarray, "_ _ _ 3"]
Values = Float[np.ndarray, " n"]

_SSIM_WINDOW_PX = 11


@dataclass(frozen=True, eq=False)
class ReconstructionScores:
    """Of n images; arrays hold a value per image, so that intervals follow.

    Attributes:
        psnr: dB.
        ssim: up to 1; None for images smaller than its window.
        perceptual: distance on the taps of EfficientNet-Lite0, 0 for equal images.
        lpips: LPIPS, where its weights were given.
        frechet: of the reconstructions to the originals themselves (r-FD), in the headline space of the network: 0
            for equal sets.
    """

    psnr: Values
    ssim: Values | None
    perceptual: Values
    lpips: Values | None
    frechet: float

    def __len__(self) -> int:
        return len(self.psnr)

    def values(self) -> dict[str, Values]:
        """The arrays that there are, by name."""
        named = {"PSNR": self.psnr, "SSIM": self.ssim, "lite0 distance": self.perceptual, "LPIPS": self.lpips}
        return {name: array for name, array in named.items() if array is not None}


@dataclass(frozen=True, eq=False)
class ReconstructionReport:
    """Everything that is said of a model's reconstructions.

    Attributes:
        whole: from all tokens, as the model is saved.
        by_stage: from the first scales, or from the first tokens; the last entry is `whole`.
        by_solver_steps: number of solver steps -> scores (D-AR); empty where none was asked for.
        ruined: of the originals with mean colour and blur left: the ceiling of the distances, the floor of PSNR.
    """

    whole: ReconstructionScores
    by_stage: dict[str, ReconstructionScores]
    by_solver_steps: dict[int, ReconstructionScores]
    ruined: ReconstructionScores


class ReconstructionMeter:
    """Compares reconstructions with originals, batch by batch; only numbers and features are kept.

    Both distances are measured on the device of the network, to which their own are moved.

    Args:
        network: whose headline space the Frechet distance is measured in.
        perceptual: distance on Lite0's taps.
        lpips: LPIPS, or None.
    """

    def __init__(self, network: FeatureNetwork, perceptual: Lite0Distance, lpips: LPIPSDistance | None):
        self._network, self._space = network, next(iter(network.spaces))
        self._perceptual = perceptual.to(network.device)
        self._lpips = None if lpips is None else lpips.to(network.device)
        self._values: dict[str, list[Tensor]] = {}
        self._features: list[Float[np.ndarray, "_ _"]] = []

    def update(self, originals: Pictures, reconstructions: Pictures) -> None:
        """Measure a batch of (b, h, w, 3) images, 0..255."""
        targets, images = (as_floats(one).to(self._network.device) for one in (originals, reconstructions))
        self._keep("psnr", psnr(images, targets))
        if min(images.shape[2:]) >= _SSIM_WINDOW_PX:
            self._keep("ssim", ssim(images, targets))
        with torch.no_grad(), whole_fp32():
            self._keep("perceptual", self._perceptual(images, targets))
            if self._lpips is not None:
                self._keep("lpips", self._lpips(images, targets))
        self._features.append(extract_features(self._network, reconstructions)[self._space])

    def scores(self, originals: Gaussian) -> ReconstructionScores:
        """What was measured; `originals` are the features of the same images."""
        arrays = {name: torch.cat(parts).numpy().astype(np.float64) for name, parts in self._values.items()}
        return ReconstructionScores(
            psnr=arrays["psnr"],
            ssim=arrays.get("ssim"),
            perceptual=arrays["perceptual"],
            lpips=arrays.get("lpips"),
            frechet=frechet_distance(Gaussian.of(np.concatenate(self._features)), originals),
        )

    def _keep(self, name: str, values: Tensor) -> None:
        self._values.setdefault(name, []).append(values.cpu())


def reconstruction_report(
    pipeline: AnyPipeline,
    images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]],
    network: FeatureNetwork,
    *,
    batch_size: int = 32,
    lpips: LPIPSDistance | None = None,
    solver_steps: Sequence[int] = (),
) -> ReconstructionReport:
    """Measure a model on images, which should be held out.

    Args:
        pipeline: of either family.
        images_uint8: (h, w, 3) images of the model's size, 0..255.
        network: for the Frechet distance, on its headline space.
        batch_size: images at once.
        lpips: measures LPIPS too, from weights of the user's (`LPIPSDistance.from_files`).
        solver_steps: also reconstruct with these numbers of solver steps (D-AR only).

    Raises:
        UserError: fewer than two images, images that do not fit, or solver steps for a model without a solver.
    """
    if solver_steps and not hasattr(pipeline, "decoder"):
        raise UserError(f"solver_steps are for D-AR models, this is a {pipeline.kind}. Leave them out.")
    perceptual = Lite0Distance()
    meters: dict[tuple[str, str | int], ReconstructionMeter] = {}
    features, last, source, count = [], "", iter(images_uint8), 0
    with tqdm(desc="reconstructions", unit="image", disable=None) as bar:
        while batch := list(islice(source, batch_size)):
            originals = np.stack(batch)
            pixels = as_floats(originals)
            stages = reconstructions_by_stage(pipeline, pixels, first_index=count)
            last = next(reversed(stages))
            found: dict[tuple[str, str | int], Pictures] = {("stage", name): drawn for name, drawn in stages.items()}
            for steps in solver_steps:
                solved = reconstruction_with_steps(cast("DARPipeline", pipeline), pixels, steps, first_index=count)
                found["solver", steps] = solved
            found["ruined", ""] = np.stack(list(ruined(originals)))
            for key, drawn in found.items():
                meters.setdefault(key, ReconstructionMeter(network, perceptual, lpips)).update(originals, drawn)
            features.append(extract_features(network, originals)[next(iter(network.spaces))])
            count += len(batch)
            bar.update(len(batch))
    if count < 2:
        raise UserError(f"reconstructions are measured on at least 2 images, got {count}. Pass held-out images.")
    reference = Gaussian.of(np.concatenate(features))
    scores = {key: meter.scores(reference) for key, meter in meters.items()}
    return ReconstructionReport(
        whole=scores["stage", last],
        by_stage={str(name): one for (kind, name), one in scores.items() if kind == "stage"},
        by_solver_steps={int(name): one for (kind, name), one in scores.items() if kind == "solver"},
        ruined=scores["ruined", ""],
    )


def as_floats(images_uint8: Pictures) -> Images:
    """(b, h, w, 3) values 0..255 as (b, 3, h, w) in [-1, 1]."""
    return torch.tensor(images_uint8).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
