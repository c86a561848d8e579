"""What a model does with held-out images: how well its tokens give them back, and how likely it finds them."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from isthmus.evaluation.reconstruction import ReconstructionReport, reconstruction_report
from isthmus.models.perceptual import LPIPSDistance
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import AnyPipeline

if TYPE_CHECKING:
    from isthmus.pipelines.dar import DARPipeline

HELD_OUT_LIMIT = 1_000
"""Held-out images that are reconstructed and read; of larger sets evenly spread ones are taken."""


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
) -> tuple[list[Score], list[Curve]]:
    """Reconstruction and likelihood; nothing where there are fewer than two images.

    Args:
        pipeline: of either family.
        images: held out, of the model's size.
        network: for the distance of the reconstructions.
        model_ids: the model's id of every class of the data; empty where either side has no classes.
        lpips: measured too where it is given.
        solver_steps: numbers of solver steps with which images are rebuilt too (D-AR).
    """
    images = some(images, HELD_OUT_LIMIT)
    if len(images) < 2:
        return [], []
    report = reconstruction_report(pipeline, images, network, lpips=lpips, solver_steps=solver_steps)
    labels: list[Label] = [None] * len(images)
    if images.labels is not None and model_ids:
        labels = [model_ids[label] for label in images.labels]
    likelihood = likelihood_scores(pipeline, images, labels)
    space = next(iter(network.spaces))
    scores = _reconstruction(report, space) + _likelihood(likelihood, labels)
    return scores, _curves(report, likelihood, space)


def _reconstruction(report: ReconstructionReport, space: str) -> list[Score]:
    ruined, scores = report.ruined.values(), []
    for name, values in report.whole.values().items():
        better = "higher" if name in ("PSNR", "SSIM") else "lower"
        scores.append(
            _mean(f"{name}, dB" if name == "PSNR" else name, values, better, ceiling=float(ruined[name].mean()))
        )
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


def _curves(report: ReconstructionReport, likelihood: LikelihoodScores, space: str) -> list[Curve]:
    stages, names = report.by_stage, tuple(report.by_stage)
    note = "Held-out images, rebuilt from their first tokens."
    psnr = tuple(float(one.psnr.mean()) for one in stages.values())
    frechet = tuple(one.frechet for one in stages.values())
    bits = likelihood.by_stage
    solved, steps = report.by_solver_steps, tuple(map(str, report.by_solver_steps))
    by_solver = [
        Curve(name=name, along="solver steps", positions=steps, values=values, note="All tokens are used.")
        for name, values in (
            ("PSNR, dB", tuple(float(one.psnr.mean()) for one in solved.values())),
            (f"r-FD-{space}", tuple(one.frechet for one in solved.values())),
        )
        if solved
    ]
    return [
        Curve(name="PSNR, dB", along="tokens used", positions=names, values=psnr, note=note),
        Curve(name=f"r-FD-{space}", along="tokens used", positions=names, values=frechet, note=note),
        Curve(name="bits per token", along="tokens", positions=tuple(bits), values=tuple(bits.values())),
        *by_solver,
    ]
