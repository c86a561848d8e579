"""The demo of the next-scale family: tokenizer, SRDD prior, samples and a report."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image

from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.demo.report import draw_curves, write_report
from isthmus.demo.stages import (
    LONGER,
    SAMPLES_PER_CLASS,
    SHOWN_PER_CLASS,
    ClassJudge,
    ClassScores,
    Clock,
    draw_samples,
    stage_run,
)
from isthmus.models.fingerprint import fingerprint
from isthmus.pictures import save_picture, table, to_pil
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.presets import prior_preset, tokenizer_preset
from isthmus.training.logs import read_log
from isthmus.training.previews import save_reconstructions
from isthmus.training.run import write_atomically
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

logger = logging.getLogger("isthmus")


@dataclass(frozen=True)
class DemoScores(ClassScores):
    """What the demo measures on its samples, and how they were drawn.

    Attributes:
        num_samples: images drawn, the same number of each class.
        guidance, seed: how they were drawn.
        seconds_per_image: drawing, pixels included.
        model: fingerprint of the transformer.
    """

    num_samples: int
    guidance: str
    seed: int
    seconds_per_image: float
    model: str


def run_next_scale_demo(options: DemoOptions, train: ImageSource, held_out: ImageSource, clock: Clock) -> None:
    """Train a tokenizer and an SRDD prior, sample and report; what is finished is used again.

    Raises:
        UserError: the folder holds something else.
    """
    folder = options.folder
    logger.info("2/4 tokenizer: pixels to tokens of six scales")
    tokenizer_run = stage_run(tokenizer_preset("small-32"), options, "tokenizer", longer=LONGER)
    clock.time("tokenizer", lambda: train_tokenizer(tokenizer_run))

    logger.info("3/4 prior: an SRDD transformer that predicts each scale from the one before")
    tokenizer = str(folder / "tokenizer")
    prior_run = stage_run(prior_preset("srdd-small"), options, "model", longer=LONGER, tokenizer=tokenizer)
    clock.time("prior", lambda: train_prior(prior_run))

    logger.info("4/4 samples, pictures and report")
    pipeline = load_pipeline(str(folder / "model"), device="cpu")
    assert isinstance(pipeline, NextScalePipeline), "the prior's run writes one"
    scores = clock.time("samples", lambda: finish(options, pipeline, train, held_out))
    tokenizer_log, prior_log = (read_log(folder / name / "log.jsonl") for name in ("tokenizer", "model"))
    draw_curves(tokenizer_log, prior_log, pipeline.schedule.sizes, folder / "curves.png")
    write_report(options, pipeline, train, scores, tokenizer_log, prior_log, clock.seconds)


def finish(options: DemoOptions, pipeline: NextScalePipeline, train: ImageSource, held_out: ImageSource) -> DemoScores:
    """Draw, measure and picture the samples; a finished stage of the same model and seed is used again."""
    folder = options.folder
    record, model = folder / "scores.json", fingerprint(pipeline.transformer)
    if record.is_file():
        before = DemoScores(**json.loads(record.read_text(encoding="utf-8")))
        if (before.model, before.seed) == (model, options.seed):
            return before
    start = time.perf_counter()
    images, labels = draw_samples(pipeline, options.seed)
    seconds = (time.perf_counter() - start) / len(images)
    rows = [images[labels == label][:SHOWN_PER_CLASS] for label in range(pipeline.num_classes)]
    names = list(train.class_names)
    save_picture(table([to_pil(row) for row in rows], row_names=names), folder / "samples.png")
    draw_scales(pipeline, names, options)
    shown = save_reconstructions(pipeline.image_tokenizer, held_out, folder, 0)
    shown.replace(folder / "reconstructions.png")
    scores = DemoScores(
        **asdict(ClassJudge(train, held_out).scores(images, labels)),
        num_samples=len(images),
        guidance=pipeline.defaults.words(),
        seed=options.seed,
        seconds_per_image=seconds,
        model=model,
    )
    write_atomically(record, json.dumps(asdict(scores), indent=2))
    return scores


def draw_scales(pipeline: NextScalePipeline, names: Sequence[str], options: DemoOptions) -> None:
    """One image of each class, coarse to fine: the previews that `stream` yields."""
    labels = list(range(pipeline.num_classes))
    # the first image of every class in samples.png
    index = [label * SAMPLES_PER_CLASS for label in labels]
    steps: list[Sequence[Image.Image]] = []
    for step in pipeline.stream(labels, seed=options.seed, image_index=index):
        assert isinstance(step.preview, list), "stream yields PIL images by default"
        steps.append(step.preview)
    columns = [f"{s} x {s}" for s in pipeline.schedule.sizes]
    picture = table(list(zip(*steps, strict=True)), row_names=names, column_names=columns)
    save_picture(picture, options.folder / "scales.png")
