"""What a model does with held-out images: how well its tokens give them back, and how likely it finds them.

Reconstructions are measured on 8-bit values, as they would be written to files. The likelihood is that of an image's
tokens given its class, not of its pixels: it compares priors over one tokenizer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from isthmus.errors import UserError
from isthmus.evaluation.features import FeatureNetwork, extract_features
from isthmus.evaluation.images import ImageSet, ruined, some
from isthmus.evaluation.record import Curve, Score
from isthmus.evaluation.statistics import Gaussian, bootstrap_interval, frechet_distance
from isthmus.files import sha256_of_file
from isthmus.nn.perceptual import Lite0Distance, LPIPSDistance, psnr, ssim
from isthmus.nn.precision import whole_fp32
from isthmus.nn.shapes import Images
from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import AnyPipeline
from isthmus.pipelines.memory import batch_size_that_fits, is_out_of_memory
from isthmus.published import lpips_distance

if TYPE_CHECKING:
    from isthmus.dar.pipeline import DARPipeline


def reconstructions_by_stage(
    pipeline: AnyPipeline, images: Images, *, first_index: int = 0
) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
    """`reconstruct_by_stage` of the pipeline, as 8-bit pictures."""
    stages = pipeline.reconstruct_by_stage(images, first_index=first_index)
    return {name: to_uint8(drawn) for name, drawn in stages.items()}


def reconstruction_with_steps(
    pipeline: "DARPipeline", images: Images, num_inference_steps: int, *, first_index: int = 0
) -> UInt8[np.ndarray, "b h w 3"]:
    """The whole D-AR reconstruction with another number of solver steps.

    Raises:
        UserError: no such number of steps, or the images do not fit the model.
    """
    found = pipeline.reconstruct(
        images, num_inference_steps=num_inference_steps, seed=0, image_index=first_index, output_type="latent"
    )
    return to_uint8(torch.as_tensor(found))


AnyPictures = UInt8[np.ndarray, "_ _ _ 3"]
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

    def update(self, originals: AnyPictures, reconstructions: AnyPictures) -> None:
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
        lpips: measures LPIPS too, from weights of the user's (`isthmus.published.lpips_distance`).
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
            found: dict[tuple[str, str | int], AnyPictures] = {("stage", name): drawn for name, drawn in stages.items()}
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


def as_floats(images_uint8: AnyPictures) -> Images:
    """(b, h, w, 3) values 0..255 as (b, 3, h, w) in [-1, 1]."""
    return torch.tensor(images_uint8).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


@dataclass(frozen=True, eq=False)
class LikelihoodScores:
    """Of n images with l tokens each; arrays per image, so that intervals follow.

    Attributes:
        nats_per_image: -log p(tokens | class).
        bits_per_token: of each image, mean over its tokens.
        by_position: bits of every token, mean over images, in the order of generation.
        by_stage: name of the scale, or of the group of tokens -> bits per token, mean over images.
    """

    nats_per_image: Float[np.ndarray, " n"]
    bits_per_token: Float[np.ndarray, " n"]
    by_position: Float[np.ndarray, " l"]
    by_stage: dict[str, float]

    def __len__(self) -> int:
        return len(self.nats_per_image)


def likelihood_scores(
    pipeline: AnyPipeline,
    images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]],
    class_labels: Sequence[Label],
    *,
    batch_size: int = 32,
) -> LikelihoodScores:
    """Cost of every image under its class: fp32 logits, without guidance or filters.

    Args:
        pipeline: of either family.
        images_uint8: (h, w, 3) images of the model's size, 0..255; held out, or the costs are those of memory.
        class_labels: one per image: names, indices or None.
        batch_size: images at once.

    Raises:
        UserError: no image, another number of labels, or images or labels that do not fit the model.
    """
    source, bits = iter(images_uint8), []
    with tqdm(desc="likelihood", unit="image", total=len(class_labels), disable=None) as bar:
        count = 0
        while batch := list(islice(source, batch_size)):
            labels = list(class_labels[count : count + len(batch)])
            count += len(batch)
            if count > len(class_labels):
                break
            bits.append(pipeline.bits_per_token(as_floats(np.stack(batch)), labels).cpu().double().numpy())
            bar.update(len(batch))
    if not bits or count != len(class_labels):
        raise UserError(
            f"a likelihood needs images and one class label for each, got {len(class_labels)} label(s) and "
            f"{'more' if count > len(class_labels) else count} image(s)."
        )
    table = np.concatenate(bits)
    by_position, by_stage, start = table.mean(axis=0), {}, 0
    for name, length in pipeline.stage_lengths.items():
        by_stage[name] = float(by_position[start : start + length].mean())
        start += length
    return LikelihoodScores(table.sum(axis=1) * math.log(2), table.mean(axis=1), by_position, by_stage)


HELD_OUT_LIMIT = 1_000
"""Held-out images that are reconstructed and read; of larger sets evenly spread ones are taken."""

_LARGEST_BATCH = 32

_FEWEST_LPIPS_PX = 16


@dataclass(frozen=True)
class Measures:
    """What is measured on held-out images beyond the usual.

    Attributes:
        lpips_weights: files with the weights of LPIPS, which is measured too; none leave it out.
        solver_steps: numbers of solver steps with which images are rebuilt too (D-AR).
    """

    lpips_weights: tuple[Path, ...] = ()
    solver_steps: tuple[int, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What a record says of them."""
        return {
            "lpips_sha256": [sha256_of_file(path) for path in self.lpips_weights],
            "solver_steps": list(self.solver_steps),
        }

    def check(self, pipeline: AnyPipeline) -> None:
        """Raise UserError for what this model cannot be asked: solver steps without a solver, LPIPS of tiny images."""
        if self.solver_steps and not hasattr(pipeline, "decoder"):
            raise UserError(f"solver steps are for D-AR models, this is a {pipeline.kind}. Leave out --solver-steps.")
        for steps in self.solver_steps:
            pipeline.check_request({"num_inference_steps": steps})
        if self.lpips_weights and pipeline.image_size < _FEWEST_LPIPS_PX:
            raise UserError(
                f"LPIPS needs images of {_FEWEST_LPIPS_PX} pixels or more, the model's have {pipeline.image_size}. "
                "Leave out --lpips-weights."
            )

    def lpips(self) -> LPIPSDistance | None:
        """LPIPS, where it is asked for. Raises UserError where a file of weights cannot be used."""
        return lpips_distance(*self.lpips_weights) if self.lpips_weights else None


THE_USUAL = Measures()


def held_out_scores(
    pipeline: AnyPipeline,
    images: ImageSet,
    network: FeatureNetwork,
    model_ids: Sequence[int],
    *,
    lpips: LPIPSDistance | None = None,
    solver_steps: Sequence[int] = (),
    batch_size: int | None = None,
) -> tuple[list[Score], list[Curve]]:
    """Reconstruction and likelihood; nothing where there are fewer than two images.

    Args:
        pipeline: of either family.
        images: held out, of the model's size.
        network: for the distance of the reconstructions.
        model_ids: the model's id of every class of the data; empty where either side has no classes.
        lpips: measured too where it is given.
        solver_steps: numbers of solver steps with which images are rebuilt too (D-AR).
        batch_size: images at once; None estimates what fits, at most `_LARGEST_BATCH`. It changes no score.

    Raises:
        UserError: memory ran out (names the next batch size to try), or an image does not fit the model.
    """
    images, total = some(images, HELD_OUT_LIMIT), len(images)
    if len(images) < 2:
        return [], []
    size = batch_size or min(_LARGEST_BATCH, batch_size_that_fits(pipeline, guided=False))
    labels: list[Label] = [None] * len(images)
    if images.labels is not None and model_ids:
        labels = [model_ids[label] for label in images.labels]
    try:
        report = reconstruction_report(
            pipeline, images, network, batch_size=size, lpips=lpips, solver_steps=solver_steps
        )
        likelihood = likelihood_scores(pipeline, images, labels, batch_size=size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        advice = f"Try --batch-size {size // 2}" if size > 1 else "Use a smaller model or --dtype bfloat16"
        raise UserError(
            f"memory ran out on held-out images at batch size {size}. {advice}; samples and their scores are kept."
        ) from error
    space = next(iter(network.spaces))
    scores = _reconstruction(report, space) + _likelihood(likelihood, labels)
    looked_at = f"{len(images):,} of {total:,} held-out images"
    scores = [replace(score, note="; ".join(filter(None, (score.note, looked_at)))) for score in scores]
    return scores, _curves(report, likelihood, space)


def _reconstruction(report: ReconstructionReport, space: str) -> list[Score]:
    ruined, scores = report.ruined.values(), []
    for name, values in report.whole.values().items():
        better = "higher" if name in ("PSNR", "SSIM") else "lower"
        scores.append(_mean(_with_unit(name), values, better, ceiling=float(ruined[name].mean())))
    scores.append(
        Score(
            name=f"r-FD-{space}",
            value=report.whole.frechet,
            better="lower",
            images=len(report.whole),
            floor=0.0,
            ceiling=report.ruined.frechet,
            note="reconstructions against the same images",
        )
    )
    return scores


def _likelihood(found: LikelihoodScores, labels: Sequence[Label]) -> list[Score]:
    given = "given their class" if any(label is not None for label in labels) else "without a class"
    return [
        _mean("nats per image", found.nats_per_image, "lower", note=f"-log p(tokens) {given}, not of pixels"),
        _mean("bits per token", found.bits_per_token, "lower"),
    ]


def _mean(
    name: str, values: Float[np.ndarray, " n"], better: str, *, ceiling: float | None = None, note: str = ""
) -> Score:
    interval = bootstrap_interval(values)
    return Score(
        name=name,
        value=interval.mean,
        better="higher" if better == "higher" else "lower",
        images=len(values),
        low=interval.low,
        high=interval.high,
        ceiling=ceiling,
        note=note,
    )


def _with_unit(name: str) -> str:
    return f"{name}, dB" if name == "PSNR" else name


def _curves(report: ReconstructionReport, likelihood: LikelihoodScores, space: str) -> list[Curve]:
    by_stage = _rebuilt(report.by_stage, space, "tokens used", "Held-out images, rebuilt from their first tokens.")
    bits = likelihood.by_stage
    positions = tuple(str(place + 1) for place in range(len(likelihood.by_position)))
    by_solver = {str(steps): one for steps, one in report.by_solver_steps.items()}
    return [
        *by_stage,
        Curve(name="bits per token", along="tokens", positions=tuple(bits), values=tuple(bits.values())),
        Curve(
            name="bits per token, by position",
            along="position of the token",
            positions=positions,
            values=tuple(map(float, likelihood.by_position)),
        ),
        *_rebuilt(by_solver, space, "solver steps", "All tokens are used."),
    ]


def _rebuilt(found: Mapping[str, ReconstructionScores], space: str, along: str, note: str) -> list[Curve]:
    """A curve of every score of reconstructions; none where there are none."""
    if not found:
        return []
    names = tuple(found)
    means: dict[str, list[float]] = {}
    for one in found.values():
        for name, values in one.values().items():
            means.setdefault(_with_unit(name), []).append(float(values.mean()))
        means.setdefault(f"r-FD-{space}", []).append(one.frechet)
    return [
        Curve(name=name, along=along, positions=names, values=tuple(values), note=note)
        for name, values in means.items()
    ]
