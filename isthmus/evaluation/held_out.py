"""What a model does with held-out images: how well its tokens give them back, and how likely it finds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float

from isthmus.data.cache import sha256_of_file
from isthmus.errors import UserError
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.image_sets import ImageSet, some
from isthmus.evaluation.intervals import bootstrap_interval
from isthmus.evaluation.likelihood_scores import LikelihoodScores, likelihood_scores
from isthmus.evaluation.protocol import Curve, Score
from isthmus.evaluation.reconstruction import ReconstructionReport, ReconstructionScores, reconstruction_report
from isthmus.models.perceptual import LPIPSDistance
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import AnyPipeline
from isthmus.pipelines.memory import batch_size_that_fits, is_out_of_memory

if TYPE_CHECKING:
    from isthmus.pipelines.dar import DARPipeline

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
            # checks its arguments at once and draws only when it is read
            cast("DARPipeline", pipeline).stream(num_inference_steps=steps, seed=0)
        if self.lpips_weights and pipeline.image_size < _FEWEST_LPIPS_PX:
            raise UserError(
                f"LPIPS needs images of {_FEWEST_LPIPS_PX} pixels or more, the model's have {pipeline.image_size}. "
                "Leave out --lpips-weights."
            )

    def lpips(self) -> LPIPSDistance | None:
        """LPIPS, where it is asked for. Raises UserError where a file of weights cannot be used."""
        return LPIPSDistance.from_files(*self.lpips_weights) if self.lpips_weights else None


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
