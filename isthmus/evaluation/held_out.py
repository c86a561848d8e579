"""What a model does with held-out images: how well its tokens give them back, and how likely it finds them.

Reconstructions are measured on 8-bit values, as they would be written to files. The likelihood is that of an image's
tokens given its class, not of its pixels: it compares priors over one tokenizer.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from isthmus.errors import UserError
from isthmus.evaluation.classes import others_of_their_class
from isthmus.evaluation.features import FeatureNetwork, extract_features
from isthmus.evaluation.images import ImageSet, Picture, ruined, some
from isthmus.evaluation.record import Curve, Score
from isthmus.evaluation.scores import mean_score
from isthmus.evaluation.statistics import Gaussian, bootstrap_interval, frechet_distance
from isthmus.files import sha256_of_file
from isthmus.nn.perceptual import Lite0Distance, LPIPSDistance, psnr, ssim
from isthmus.nn.precision import whole_fp32
from isthmus.nn.shapes import Images
from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import AnyPipeline
from isthmus.pipelines.memory import batch_size_that_fits, naming_next_batch_size
from isthmus.published import lpips_distance

AnyPictures = UInt8[np.ndarray, "_ _ _ 3"]
Values = Float[np.ndarray, " n"]

HELD_OUT_LIMIT = 1_000
"""Held-out images that are reconstructed and read; of larger sets evenly spread ones are taken."""

PSNR, LITE0 = "PSNR, dB", "lite0 distance"
OWN_WORDS, NO_WORDS, OTHER_WORDS = "", "without words", "under another's caption"
UNTOLD: Mapping[str, Sequence[str] | None] = MappingProxyType({OWN_WORDS: None})
_NOTES = {
    NO_WORDS: "the same images under the empty prompt",
    OTHER_WORDS: "the same images under captions of others (of their class, where there are classes)",
}
_HIGHER_IS_BETTER = (PSNR, "SSIM")
_SSIM_WINDOW_PX = 11
_FEWEST_LPIPS_PX = 16
_LARGEST_BATCH = 32


@dataclass(frozen=True)
class Measures:
    """What is measured on held-out images beyond the usual.

    Attributes:
        lpips_weights: files with the weights of LPIPS, which is measured too; none leave it out.
        solver_steps: numbers of solver steps with which images are rebuilt too.
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
        if self.solver_steps and not pipeline.has_solver:
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


def as_floats(images_uint8: AnyPictures) -> Images:
    """(b, h, w, 3) values 0..255 as (b, 3, h, w) in [-1, 1]."""
    return torch.tensor(images_uint8).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def reconstructions_by_stage(
    pipeline: AnyPipeline, images: Images, *, first_index: int = 0
) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
    """`reconstruct_by_stage` of the pipeline, as 8-bit pictures."""
    stages = pipeline.reconstruct_by_stage(images, first_index=first_index)
    return {name: to_uint8(drawn) for name, drawn in stages.items()}


@dataclass(frozen=True, eq=False)
class ReconstructionScores:
    """Of n images.

    Attributes:
        values: name of a score -> its value for every image, so that intervals follow: PSNR; SSIM, where images are as
            large as its window; the distance on the taps of EfficientNet-Lite0; LPIPS, where its weights were given.
        frechet: of the reconstructions to the originals themselves (r-FD), in the headline space of the network: 0 for
            equal sets.
    """

    values: dict[str, Values]
    frechet: float


class ReconstructionMeter:
    """Compares reconstructions with originals, batch by batch; only numbers and features are kept.

    The distances are moved to the device of the network, in whose headline space the Frechet distance is measured.
    """

    def __init__(self, network: FeatureNetwork, perceptual: Lite0Distance, lpips: LPIPSDistance | None):
        self._network = network
        self._perceptual = perceptual.to(network.device)
        self._lpips = None if lpips is None else lpips.to(network.device)
        self._values: dict[str, list[Tensor]] = {}
        self._features: list[Float[np.ndarray, "_ _"]] = []

    def update(self, originals: AnyPictures, reconstructions: AnyPictures) -> None:
        """Measure a batch of (b, h, w, 3) images, 0..255."""
        targets, images = (as_floats(one).to(self._network.device) for one in (originals, reconstructions))
        found = {PSNR: psnr(images, targets)}
        if min(images.shape[2:]) >= _SSIM_WINDOW_PX:
            found["SSIM"] = ssim(images, targets)
        with torch.no_grad(), whole_fp32():
            found[LITE0] = self._perceptual(images, targets)
            if self._lpips is not None:
                found["LPIPS"] = self._lpips(images, targets)
        for name, values in found.items():
            self._values.setdefault(name, []).append(values.cpu())
        self._features.append(extract_features(self._network, reconstructions)[self._network.headline])

    @property
    def features(self) -> Float[np.ndarray, "_ _"]:
        """Of all reconstructions so far, in the headline space."""
        return np.concatenate(self._features)

    def scores(self, originals: Gaussian) -> ReconstructionScores:
        """What was measured; `originals` are the features of the same images."""
        arrays = {name: torch.cat(parts).numpy().astype(np.float64) for name, parts in self._values.items()}
        return ReconstructionScores(arrays, frechet_distance(Gaussian.of(self.features), originals))


@dataclass(frozen=True, eq=False)
class ReconstructionReport:
    """Everything that is said of a model's reconstructions.

    Attributes:
        by_stage: from the first scales, or from the first tokens; the last entry is from all of them.
        by_solver_steps: number of solver steps -> scores; empty where none was asked for.
        ruined: of the originals with mean colour and blur left: the ceiling of the distances, the floor of PSNR.
    """

    by_stage: dict[str, ReconstructionScores]
    by_solver_steps: dict[str, ReconstructionScores]
    ruined: ReconstructionScores


def reconstruction_report(
    pipeline: AnyPipeline,
    images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]],
    network: FeatureNetwork,
    *,
    batch_size: int,
    lpips: LPIPSDistance | None = None,
    solver_steps: Sequence[int] = (),
) -> ReconstructionReport:
    """Measure a model on two images or more, which should be held out and of its size.

    `solver_steps` are numbers of steps with which a model that has a solver rebuilds them too.
    """
    perceptual, features, source, count = Lite0Distance(), [], iter(images_uint8), 0
    meters: dict[str, dict[str, ReconstructionMeter]] = {}
    with tqdm(desc="reconstructions", unit="image", disable=None) as bar:
        while batch := list(islice(source, batch_size)):
            originals = np.stack(batch)
            pixels = as_floats(originals)
            rebuilt = {
                "stages": reconstructions_by_stage(pipeline, pixels, first_index=count),
                "solver": {
                    str(steps): _whole(pipeline, pixels, count, num_inference_steps=steps) for steps in solver_steps
                },
                "ruined": {"": np.stack(list(ruined(originals)))},
            }
            for kind, drawn_by_name in rebuilt.items():
                for name, drawn in drawn_by_name.items():
                    known = meters.setdefault(kind, {})
                    known.setdefault(name, ReconstructionMeter(network, perceptual, lpips)).update(originals, drawn)
            features.append(extract_features(network, originals)[network.headline])
            count += len(batch)
            bar.update(len(batch))
    reference = Gaussian.of(np.concatenate(features))
    scores = {kind: {name: one.scores(reference) for name, one in known.items()} for kind, known in meters.items()}
    return ReconstructionReport(scores["stages"], scores.get("solver", {}), scores["ruined"][""])


def _whole(pipeline: AnyPipeline, images: Images, first_index: int, **steps: int) -> UInt8[np.ndarray, "b h w 3"]:
    """The last stage of `reconstructions_by_stage`, without those before it; a solver may take other `steps`."""
    noise = {"seed": 0, "image_index": first_index} if pipeline.has_solver else {}
    found = cast(Any, pipeline).reconstruct(images, output_type="pt", **noise, **steps)
    return to_uint8(torch.as_tensor(found) * 2 - 1)


def rebuilt(
    pipeline: AnyPipeline, images: ImageSet, *, batch_size: int | None = None, title: str = "reconstructions"
) -> Iterator[Picture]:
    """Images (0..255, of the model's size) from all of their tokens: what `reconstruction_report` measures as a whole.

    Args:
        batch_size: images at once, as for `held_out_scores`.
        title: of the progress bar.

    Raises UserError where memory ran out, with the next batch size to try.
    """
    size, source, count = _at_once(pipeline, batch_size), iter(images), 0
    with tqdm(desc=title, unit="image", total=len(images), disable=None) as bar:
        while batch := list(islice(source, size)):
            with _naming_smaller(size, kept="samples are kept"):
                drawn = _whole(pipeline, as_floats(np.stack(batch)), count)
            count += len(batch)
            bar.update(len(batch))
            yield from drawn


def _at_once(pipeline: AnyPipeline, batch_size: int | None) -> int:
    return batch_size or min(_LARGEST_BATCH, batch_size_that_fits(pipeline, guided=False))


def _naming_smaller(size: int, *, kept: str) -> AbstractContextManager[None]:
    smaller = f"Try --batch-size {size // 2}" if size > 1 else "Use --device cpu"
    return naming_next_batch_size(size, advice=f"{smaller}: {kept}.")


def token_bits(
    pipeline: AnyPipeline,
    images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]],
    class_labels: Sequence[Label],
    *,
    batch_size: int,
    prompts: Mapping[str, Sequence[str] | None] = UNTOLD,
) -> dict[str, Float[np.ndarray, "n l"]]:
    """-log2 p of every token of an image, in the order of generation, under its class: without guidance or filters.

    The images (of the model's size, one label each) should be held out, or the costs are those of memory. `prompts`
    are, by name, sets of one prompt per image under which they are read, each on its own; None is no prompt.
    """
    source, count = iter(images_uint8), 0
    bits: dict[str, list[Float[np.ndarray, "_ l"]]] = {name: [] for name in prompts}
    with tqdm(desc="likelihood", unit="image", total=len(class_labels), disable=None) as bar:
        while batch := list(islice(source, batch_size)):
            rows = slice(count, count + len(batch))
            token_ids: Any = pipeline.encode(as_floats(np.stack(batch)))  # of its own family
            for name, words in prompts.items():
                told: dict[str, Any] = {} if words is None else {"prompt": list(words[rows])}
                found = pipeline.bits_per_token(class_labels=class_labels[rows], token_ids=token_ids, **told)
                bits[name].append(found.cpu().double().numpy())
            count += len(batch)
            bar.update(len(batch))
    return {name: np.concatenate(parts) for name, parts in bits.items()}


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

    A model that reads text is told each image's own caption. What its tokens cost without words, and under the caption
    of another image, stands beside.

    Args:
        model_ids: the model's id of every class of the data; empty where either side has no classes.
        solver_steps: numbers of solver steps with which images are rebuilt too.
        batch_size: images at once; None estimates what fits, at most `_LARGEST_BATCH`. It changes no score.

    Raises:
        UserError: memory ran out (names the next batch size to try), or an image does not fit the model.
    """
    images, total = some(images, HELD_OUT_LIMIT), len(images)
    if len(images) < 2:
        return [], []
    size = _at_once(pipeline, batch_size)
    labels: list[Label] = [None] * len(images)
    if images.labels is not None and model_ids:
        labels = [model_ids[label] for label in images.labels]
    with _naming_smaller(size, kept="samples and their scores are kept"):
        report = reconstruction_report(
            pipeline, images, network, batch_size=size, lpips=lpips, solver_steps=solver_steps
        )
        read = token_bits(pipeline, images, labels, batch_size=size, prompts=_prompts(pipeline, images))
    bits = read.pop(OWN_WORDS)
    given = [
        *(["class"] if any(label is not None for label in labels) else []),
        *(["caption"] if pipeline.reads_text else []),
    ]
    words = f"given their {' and '.join(given)}" if given else "without a class"
    scores = [
        *_reconstruction(report, network.headline),
        _mean("nats per image", bits.sum(axis=1) * math.log(2), note=f"-log p(tokens) {words}, not of pixels"),
        _mean("bits per token", bits.mean(axis=1)),
        *(_untold(name, other.mean(axis=1), bits.mean(axis=1)) for name, other in read.items()),
    ]
    looked_at = f"{len(images):,} of {total:,} held-out images"
    scores = [replace(score, note="; ".join(filter(None, (score.note, looked_at)))) for score in scores]
    return scores, _curves(report, bits.mean(axis=0), pipeline.stage_lengths, network.headline)


def _untold(name: str, bits: Values, told: Values) -> Score:
    """Bits under other words than an image's own, and how many its own save; both are of the same images."""
    saved = bootstrap_interval(bits - told)
    words = f"{_NOTES[name]}; their own captions save {saved.mean:.3g} [{saved.low:.3g}, {saved.high:.3g}]"
    return _mean(f"bits per token {name}", bits, note=words)


def _prompts(pipeline: AnyPipeline, images: ImageSet) -> dict[str, Sequence[str] | None]:
    """The words under which images are read, by name."""
    if not pipeline.reads_text:
        return dict(UNTOLD)
    captions = images.captions or [""] * len(images)
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    others = others_of_their_class(labels)
    return {OWN_WORDS: captions, NO_WORDS: [""] * len(images), OTHER_WORDS: [captions[int(other)] for other in others]}


def _reconstruction(report: ReconstructionReport, space: str) -> list[Score]:
    *_, whole = report.by_stage.values()
    ruined_means = {name: float(values.mean()) for name, values in report.ruined.values.items()}
    return [
        *(_mean(name, values, ceiling=ruined_means[name]) for name, values in whole.values.items()),
        Score(
            name=f"r-FD-{space}",
            value=whole.frechet,
            better="lower",
            images=len(whole.values[PSNR]),
            floor=0.0,
            ceiling=report.ruined.frechet,
            note="reconstructions against the same images",
        ),
    ]


def _mean(name: str, values: Values, **others: Any) -> Score:
    better = "higher" if name in _HIGHER_IS_BETTER else "lower"
    return mean_score(name, bootstrap_interval(values), len(values), better, **others)


def _curves(
    report: ReconstructionReport, bits: Float[np.ndarray, " l"], lengths: Mapping[str, int], space: str
) -> list[Curve]:
    places = np.cumsum(list(lengths.values()))[:-1]
    by_stage = {name: float(part.mean()) for name, part in zip(lengths, np.split(bits, places), strict=True)}
    return [
        *_rebuilt(report.by_stage, space, "tokens used", "Held-out images, rebuilt from their first tokens."),
        Curve(name="bits per token", along="tokens", positions=tuple(by_stage), values=tuple(by_stage.values())),
        Curve(
            name="bits per token, by position",
            along="position of the token",
            positions=tuple(str(place + 1) for place in range(len(bits))),
            values=tuple(map(float, bits)),
        ),
        *_rebuilt(report.by_solver_steps, space, "solver steps", "All tokens are used."),
    ]


def _rebuilt(found: Mapping[str, ReconstructionScores], space: str, along: str, note: str) -> list[Curve]:
    """A curve of every score of reconstructions; none where there are none."""
    means: dict[str, list[float]] = {}
    for one in found.values():
        for name, values in one.values.items():
            means.setdefault(name, []).append(float(values.mean()))
        means.setdefault(f"r-FD-{space}", []).append(one.frechet)
    return [
        Curve(name=name, along=along, positions=tuple(found), values=tuple(values), note=note)
        for name, values in means.items()
    ]
