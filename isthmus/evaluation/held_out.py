"""What a model does with held-out images: how well its tokens give them back, and how likely it finds them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.image_sets import ImageSet, some
from isthmus.evaluation.intervals import bootstrap_interval
from isthmus.evaluation.likelihood_scores import LikelihoodScores, likelihood_scores
from isthmus.evaluation.protocol import Curve, Score
from isthmus.evaluation.reconstruction import ReconstructionReport, reconstruction_report
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import AnyPipeline

HELD_OUT_LIMIT = 1_000
"""Held-out images that are reconstructed and read; of larger sets evenly spread ones are taken."""


def held_out_scores(
    pipeline: AnyPipeline, images: ImageSet, network: FeatureNetwork, model_ids: Sequence[int]
) -> tuple[list[Score], list[Curve]]:
    """Reconstruction and likelihood; nothing where there are fewer than two images.

    Args:
        pipeline: of either family.
        images: held out, of the model's size.
        network: for the distance of the reconstructions.
        model_ids: the model's id of every class of the data; empty where either side has no classes.
    """
    images = some(images, HELD_OUT_LIMIT)
    if len(images) < 2:
        return [], []
    report = reconstruction_report(pipeline, images, network)
    labels: list[Label] = [None] * len(images)
    if images.labels is not None and model_ids:
        labels = [model_ids[label] for label in images.labels]
    likelihood = likelihood_scores(pipeline, images, labels)
    scores = _reconstruction(report, next(iter(network.spaces))) + _likelihood(likelihood, labels)
    return scores, _curves(report, likelihood)


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


def _curves(report: ReconstructionReport, likelihood: LikelihoodScores) -> list[Curve]:
    stages, names = report.by_stage, tuple(report.by_stage)
    note = "Held-out images, rebuilt from their first tokens."
    psnr = tuple(float(one.psnr.mean()) for one in stages.values())
    frechet = tuple(one.frechet for one in stages.values())
    bits = likelihood.by_stage
    return [
        Curve(name="PSNR, dB", along="tokens used", positions=names, values=psnr, note=note),
        Curve(name="r-FD", along="tokens used", positions=names, values=frechet, note=note),
        Curve(name="bits per token", along="tokens", positions=tuple(bits), values=tuple(bits.values())),
    ]
