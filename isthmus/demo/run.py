"""`isthmus demo`: images, tokenizer, prior, samples and a report, on a laptop, without a network.

What is finished is used again: every stage looks for what an earlier run of the demo left.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.runs import diffusion_tokenizer_preset, next_token_prior_preset
from isthmus.data.batches import EvaluationImages
from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.demo.report import (
    DARScores,
    DemoScores,
    dar_report,
    draw_curves,
    draw_dar_curves,
    next_scale_report,
)
from isthmus.evaluation.classes import NearestClassMean
from isthmus.evaluation.features import extract_features, feature_network, sample_features
from isthmus.evaluation.held_out import as_floats
from isthmus.evaluation.reference import open_splits
from isthmus.evaluation.scores import RealImages
from isthmus.files import alone_in, write_whole
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.runs import prior_preset, tokenizer_preset
from isthmus.next_scale.train_tokenizer import save_previews
from isthmus.nn.perceptual import psnr
from isthmus.nn.stored_llama import fingerprint
from isthmus.pictures import save_picture, table, to_pil, to_uint8
from isthmus.pipelines.loading import AnyPipeline, load_pipeline
from isthmus.samples import SampleRequest, Samples, draw, read
from isthmus.training.config import Run
from isthmus.training.run import read_log
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

logger = logging.getLogger("isthmus")

T = TypeVar("T")
DATA, IMAGE_SIZE_PX = "openmoji", 32
SAMPLES_PER_CLASS = 50
SHOWN_PER_CLASS = 10
# `--budget long` trains so many times longer
LONGER = 4


@alone_in("options.folder")
def run_demo(options: DemoOptions) -> Path:
    """Run every stage that is not finished yet and write `report.md`; returns the folder.

    Raises:
        UserError: an unknown class, or the folder holds something else.
    """
    clock = Clock(options.folder / "seconds.json")
    logger.info("1/4 images: %s at %d px", DATA, IMAGE_SIZE_PX)
    train, held_out = clock.time(
        "images",
        lambda: tuple(
            open_source(DATA, image_size=IMAGE_SIZE_PX, split=split, classes=options.chosen_classes)
            for split in ("train", "val")
        ),
    )
    logger.info("    %d images to train on, %d held out: %s", len(train), len(held_out), ", ".join(train.class_names))
    if options.family == "dar":
        run_dar_demo(options, train, clock)
    else:
        run_next_scale_demo(options, train, held_out, clock)
    logger.info("done in %.0f s: see %s", sum(clock.seconds.values()), options.folder / "report.md")
    return options.folder


def run_next_scale_demo(options: DemoOptions, train: ImageSource, held_out: ImageSource, clock: "Clock") -> None:
    """Train a tokenizer and an SRDD prior, sample and report."""
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
    scores = finished_scores(options, DemoScores)
    if scores is None or scores.model != fingerprint(pipeline.transformer):
        forget_samples(options, scores)
        samples = clock.time("drawing", lambda: draw_samples(pipeline, options))
        scores = clock.time("samples", lambda: finish(options, pipeline, samples, held_out, clock))
    tokenizer_log, prior_log = (read_log(folder / name / "log.jsonl") for name in ("tokenizer", "model"))
    draw_curves(tokenizer_log, prior_log, pipeline.schedule.sizes, folder / "curves.png")
    next_scale_report(options, pipeline, train, scores, tokenizer_log, prior_log, clock.seconds)


def finish(
    options: DemoOptions, pipeline: NextScalePipeline, samples: Samples, held_out: ImageSource, clock: "Clock"
) -> DemoScores:
    """Measure and picture the samples."""
    columns = [f"{size} x {size}" for size in pipeline.schedule.sizes]
    draw_previews(pipeline, held_out.class_names, options, columns, "scales.png")
    shown = save_previews(pipeline.image_tokenizer, EvaluationImages(held_out, pipeline.image_size), options.folder, 0)
    shown.replace(options.folder / "reconstructions.png")
    figures = sample_figures(real_images(pipeline, options), samples, pipeline, options, clock)
    return kept(options, DemoScores(**figures, model=fingerprint(pipeline.transformer)))


def run_dar_demo(options: DemoOptions, train: ImageSource, clock: "Clock") -> None:
    """Train a diffusion tokenizer and a Llama prior, sample and report."""
    folder = options.folder
    logger.info("2/4 tokenizer: pixels to a sequence of tokens, groups of which drive the steps of a diffusion")
    preset = diffusion_tokenizer_preset("dar-small-32")
    tokenizer_run = stage_run(preset, options, "tokenizer", longer=LONGER)
    clock.time("tokenizer", lambda: train_tokenizer(tokenizer_run))

    logger.info("3/4 prior: a Llama that predicts the next token")
    tokenizer = str(folder / "tokenizer")
    # a prior of so few images overfits long before a tokenizer does
    prior_run = stage_run(next_token_prior_preset("dar-prior-small"), options, "model", longer=3, tokenizer=tokenizer)
    clock.time("prior", lambda: train_prior(prior_run))

    logger.info("4/4 samples, pictures and report")
    pipeline = load_pipeline(str(folder / "model"), device="cpu")
    assert isinstance(pipeline, DARPipeline), "the prior's run writes one"
    scores = finished_scores(options, DARScores)
    if scores is None or scores.model != pipeline.fingerprint:
        forget_samples(options, scores)
        samples = clock.time("drawing", lambda: draw_samples(pipeline, options))
        scores = clock.time("samples", lambda: finish_dar(options, pipeline, samples, clock))
    tokenizer_log, prior_log = (read_log(folder / name / "log.jsonl") for name in ("tokenizer", "model"))
    draw_dar_curves(tokenizer_log, prior_log, folder / "curves.png")
    dar_report(options, pipeline, train, scores, tokenizer_log, prior_log, clock.seconds)


_PREFIX_SHARES = (0, 1 / 32, 3 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Tokens of the layout strip, as shares of all: 0, 8, 12, 16, 32, 64 and 128 of 256."""
_SMALL_SIDE_PX = 4
_TIMINGS = 5


def finish_dar(options: DemoOptions, pipeline: DARPipeline, samples: Samples, clock: "Clock") -> DARScores:
    """Measure and picture samples and held-out images."""
    real = real_images(pipeline, options)
    assert real.splits is not None and real.splits.held_out.labels is not None, "the data set has classes"
    held_out, names, headline = real.splits.held_out, list(real.splits.class_names), next(iter(real.network.spaces))
    unseen, labels = as_floats(np.stack(list(held_out))), real.splits.held_out.labels
    first_preview = draw_dar_previews(pipeline, names, options)
    rebuilt, shuffled = reconstructions(pipeline, unseen)
    draw_reconstructions(unseen, rebuilt, labels, options)
    # whatever comes first, its layout is what the others take on
    draw_layouts(pipeline, unseen[:1], names, options)
    figures = sample_figures(real, samples, pipeline, options, clock)
    training = real.measured(len(samples)).training
    assert training is not None, "there is a data set"
    judge = NearestClassMean.fit(training.rows, training.labels)
    features = extract_features(real.network, to_uint8(rebuilt))[headline]
    scores = DARScores(
        **figures,
        psnr=psnr(rebuilt, unseen).mean().item(),
        psnr_shuffled=psnr(shuffled, unseen).mean().item(),
        psnr_small=psnr(shrunk_and_back(unseen), unseen).mean().item(),
        reconstruction_accuracy=float((judge.predict(features) == labels).mean()),
        num_held_out=len(unseen),
        first_preview=first_preview,
        model=pipeline.fingerprint,
    )
    return kept(options, scores)


class Clock:
    """Seconds per phase, kept in a file: a stage that was finished earlier keeps the time it took then."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def time(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` and note how long it took, unless an earlier run took longer (it did the work)."""
        start = time.perf_counter()
        result = work()
        self.seconds[phase] = round(max(time.perf_counter() - start, self.seconds.get(phase, 0.0)), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.seconds))
        return result


StageRun = TypeVar("StageRun", bound=Run)


def stage_run(preset: StageRun, options: DemoOptions, folder: str, *, longer: int, **changes: Any) -> StageRun:
    """A stage of the demo: the run of a preset on the demo's classes, `longer` times as long with `--budget long`."""
    return replace(
        preset,
        num_steps=preset.num_steps * (longer if options.budget == "long" else 1),
        classes=options.chosen_classes,
        seed=options.seed,
        mixed_precision=options.mixed_precision,
        out=options.folder / folder,
        **changes,
    )


Scores = TypeVar("Scores", bound=DemoScores)


def finished_scores(options: DemoOptions, kind: type[Scores]) -> Scores | None:
    """What an earlier run measured of samples of this seed."""
    record = options.folder / "scores.json"
    if not record.is_file():
        return None
    before = kind(**json.loads(record.read_text(encoding="utf-8")))
    return before if before.seed == options.seed else None


def kept(options: DemoOptions, scores: Scores) -> Scores:
    """Scores, written for later runs."""
    text = json.dumps(asdict(scores), indent=2)
    write_whole(options.folder / "scores.json", text)
    return scores


def forget_samples(options: DemoOptions, scores: DemoScores | DARScores | None) -> None:
    """Delete the samples of another model, whose scores these are."""
    if scores is not None:
        shutil.rmtree(options.folder / "samples", ignore_errors=True)


def draw_samples(pipeline: AnyPipeline, options: DemoOptions) -> Samples:
    """The folder samples/, the same number of images of each class one after the other, and samples.png."""
    classes = list(range(pipeline.num_classes))
    request = SampleRequest.of(
        pipeline,
        [label for label in classes for _ in range(SAMPLES_PER_CLASS)],
        classes={"class_ids": classes, "images_per_class": SAMPLES_PER_CLASS},
        seed=options.seed,
    )
    draw(pipeline, options.folder / "samples", request, batch_size=SAMPLES_PER_CLASS, title="samples")
    samples = read(options.folder / "samples", len(request))
    starts = range(0, len(samples), SAMPLES_PER_CLASS)
    rows = [[Image.fromarray(samples.image(start + i)) for i in range(SHOWN_PER_CLASS)] for start in starts]
    names = [pipeline.label_name(label) for label in classes]
    save_picture(table(rows, row_names=names), options.folder / "samples.png")
    return samples


def real_images(pipeline: AnyPipeline, options: DemoOptions) -> RealImages:
    """What samples of the demo are measured against, as `isthmus evaluate` does it."""
    size = pipeline.image_size
    splits = open_splits(DATA, image_size=size, classes=options.chosen_classes or (), wanted=())
    return RealImages.of(feature_network("lite0"), splits, size=(size, size))


def sample_figures(
    real: RealImages, samples: Samples, pipeline: AnyPipeline, options: DemoOptions, clock: Clock
) -> dict[str, Any]:
    """The fields of `DemoScores` that do not tell the model."""
    assert real.splits is not None, "the demo has a data set"
    names, accuracy = real.splits.class_names, "class accuracy (nearest mean)"
    found = real.scores(sample_features(real.network, samples), samples.labels, names)
    scores = {score.name: score for score in found.scores}
    return {
        "class_accuracy": scores[accuracy].value,
        "class_accuracy_held_out": scores[accuracy].floor,
        "accuracy_by_class": {name: found.by_class[name][accuracy] for name in names},
        "memorised": scores["memorised share"].value,
        "memorised_views": scores["memorised share"].ceiling,
        "num_samples": len(samples),
        "guidance": pipeline.defaults.words(),
        "seed": options.seed,
        "seconds_per_image": clock.seconds["drawing"] / len(samples),
    }


def draw_previews(
    pipeline: AnyPipeline, names: Sequence[str], options: DemoOptions, columns: Sequence[str], file: str
) -> None:
    """The first sample of each class while it grows: the previews that `stream` yields."""
    labels = list(range(pipeline.num_classes))
    index = [label * SAMPLES_PER_CLASS for label in labels]
    steps: list[Sequence[Image.Image]] = []
    for step in pipeline.stream(labels, seed=options.seed, image_index=index):
        assert isinstance(step.preview, list), "stream yields PIL images by default"
        steps.append(step.preview)
    picture = table(list(zip(*steps, strict=True)), row_names=names, column_names=columns)
    save_picture(picture, options.folder / file)


def draw_dar_previews(pipeline: DARPipeline, names: Sequence[str], options: DemoOptions) -> float:
    """previews.png, by number of tokens; returns when the first preview came, as a share of the whole."""
    columns = pipeline.step_names(pipeline.scheduler.config["num_inference_steps"])
    draw_previews(pipeline, names, options, [name.split()[0] for name in columns], "previews.png")
    return float(np.median([first_preview_share(pipeline, options.seed) for _ in range(_TIMINGS)]))


def reconstructions(pipeline: DARPipeline, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images rebuilt from their own codes, and from those of an image half the set away, under the same noise."""
    token_ids = pipeline.encode(images)
    seeds = list(range(len(images)))
    decoded = [
        torch.as_tensor(pipeline.decode(ids, seed=0, image_index=seeds, output_type="pt")) * 2 - 1
        for ids in (token_ids, token_ids.roll(len(images) // 2, dims=0))
    ]
    return decoded[0], decoded[1]


def shrunk_and_back(images: Tensor, side: int = _SMALL_SIDE_PX) -> Tensor:
    """Images averaged to `side` x `side` and enlarged again: what any useful code must beat."""
    small = F.interpolate(images, size=side, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)


def draw_reconstructions(images: Tensor, rebuilt: Tensor, labels: np.ndarray, options: DemoOptions) -> None:
    """Held-out images above what their tokens give back, the first few of every class."""
    shown = [i for label in np.unique(labels) for i in np.flatnonzero(labels == label)[:4]]
    rows = [to_pil(images[shown]), to_pil(rebuilt[shown]), to_pil(shrunk_and_back(images[shown]))]
    picture = table(rows, row_names=["image", "rebuilt", "4 x 4"])
    save_picture(picture, options.folder / "reconstructions.png")


def first_preview_share(pipeline: DARPipeline, seed: int) -> float:
    """Share of the time of a single image after which its first preview is there."""
    start = time.perf_counter()
    times = [time.perf_counter() - start for _ in pipeline.stream(0 if pipeline.num_classes else None, seed=seed)]
    return times[0] / times[-1]


def draw_layouts(pipeline: DARPipeline, reference: Tensor, names: Sequence[str], options: DemoOptions) -> None:
    """Rows = labels, columns = how many first tokens of the reference are kept; the reference itself comes last."""
    total = pipeline.token_layout.num_tokens
    lengths = sorted({round(share * total) for share in _PREFIX_SHARES})
    rows = []
    for label in range(pipeline.num_classes):
        output = pipeline(
            [label] * len(lengths), prefix_image=reference, prefix_tokens=lengths, seed=options.seed,
            image_index=[label] * len(lengths),
        )  # fmt: skip
        assert isinstance(output.images, list), "a call returns PIL images by default"
        rows.append([*output.images, *to_pil(reference)])
    columns = [*(str(length) for length in lengths), "image"]
    save_picture(table(rows, row_names=names, column_names=columns), options.folder / "layout.png")
