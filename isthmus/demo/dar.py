"""The demo of the D-AR family: diffusion tokenizer, Llama prior, samples, previews, layout control and a report."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from isthmus.dar_presets import diffusion_tokenizer_preset, next_token_prior_preset
from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource
from isthmus.demo.dar_report import draw_dar_curves, write_dar_report
from isthmus.demo.options import DemoOptions
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
from isthmus.functional.psnr import psnr
from isthmus.pictures import save_picture, table, to_pil
from isthmus.pipelines.dar import DARPipeline
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.logs import read_log
from isthmus.training.run import write_atomically
from isthmus.training.train_diffusion_tokenizer import train_diffusion_tokenizer
from isthmus.training.train_prior import train_prior

logger = logging.getLogger("isthmus")

# tokens of the layout strip, as shares of all: 0, 8, 12, 16, 32, 64 and 128 of 256
_PREFIX_SHARES = (0, 1 / 32, 3 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_SMALL_SIDE_PX = 4
_TIMINGS = 5


@dataclass(frozen=True)
class DARScores(ClassScores):
    """What the demo measures on held-out images and on its samples, and how those were drawn.

    Attributes:
        psnr: of held-out images from their own codes, dB, mean over images.
        psnr_shuffled: of held-out images from another image's codes.
        psnr_small: of held-out images shrunk to 4 x 4 and back, what a handful of colours gives.
        reconstruction_accuracy: share of reconstructed held-out images whose nearest class mean is their own class.
        num_held_out: images these are measured on.
        num_samples: images drawn, the same number of each class.
        guidance, seed: how they were drawn.
        seconds_per_image: drawing, pixels included.
        first_preview: share of the time of a single image after which its first preview is there.
        model: fingerprint of the pipeline.
    """

    psnr: float
    psnr_shuffled: float
    psnr_small: float
    reconstruction_accuracy: float
    num_held_out: int
    num_samples: int
    guidance: str
    seed: int
    seconds_per_image: float
    first_preview: float
    model: str


def run_dar_demo(options: DemoOptions, train: ImageSource, held_out: ImageSource, clock: Clock) -> None:
    """Train a diffusion tokenizer and a Llama prior, sample and report; what is finished is used again.

    Raises:
        UserError: the folder holds something else.
    """
    folder = options.folder
    logger.info("2/4 tokenizer: pixels to a sequence of tokens, groups of which drive the steps of a diffusion")
    preset = diffusion_tokenizer_preset("dar-small-32")
    tokenizer_run = stage_run(preset, options, "tokenizer", longer=LONGER)
    clock.time("tokenizer", lambda: train_diffusion_tokenizer(tokenizer_run))

    logger.info("3/4 prior: a Llama that predicts the next token")
    tokenizer = str(folder / "tokenizer")
    # a prior of so few images overfits long before a tokenizer does
    prior_run = stage_run(next_token_prior_preset("dar-prior-small"), options, "model", longer=3, tokenizer=tokenizer)
    clock.time("prior", lambda: train_prior(prior_run))

    logger.info("4/4 samples, pictures and report")
    pipeline = load_pipeline(str(folder / "model"), device="cpu")
    assert isinstance(pipeline, DARPipeline), "the prior's run writes one"
    scores = clock.time("samples", lambda: finish(options, pipeline, train, held_out))
    tokenizer_log, prior_log = (read_log(folder / name / "log.jsonl") for name in ("tokenizer", "model"))
    draw_dar_curves(tokenizer_log, prior_log, folder / "curves.png")
    write_dar_report(options, pipeline, train, scores, tokenizer_log, prior_log, clock.seconds)


def finish(options: DemoOptions, pipeline: DARPipeline, train: ImageSource, held_out: ImageSource) -> DARScores:
    """Draw, measure and picture; a finished stage of the same model and seed is used again."""
    folder, names = options.folder, list(train.class_names)
    record = folder / "scores.json"
    if record.is_file():
        before = DARScores(**json.loads(record.read_text(encoding="utf-8")))
        if (before.model, before.seed) == (pipeline.fingerprint, options.seed):
            return before
    start = time.perf_counter()
    images, labels = draw_samples(pipeline, options.seed)
    seconds = (time.perf_counter() - start) / len(images)
    rows = [images[labels == label][:SHOWN_PER_CLASS] for label in range(pipeline.num_classes)]
    save_picture(table([to_pil(row) for row in rows], row_names=names), folder / "samples.png")
    first_preview = draw_previews(pipeline, names, options)

    unseen = images_of(held_out, pipeline.image_size)
    rebuilt, shuffled = reconstructions(pipeline, unseen)
    draw_reconstructions(unseen, rebuilt, held_out.labels, options)
    # whatever comes first, its layout is what the others take on
    draw_layouts(pipeline, unseen[:1], names, options)
    judge = ClassJudge(train, held_out)
    scores = DARScores(
        **asdict(judge.scores(images, labels)),
        psnr=psnr(rebuilt, unseen).mean().item(),
        psnr_shuffled=psnr(shuffled, unseen).mean().item(),
        psnr_small=psnr(shrunk_and_back(unseen), unseen).mean().item(),
        reconstruction_accuracy=judge.accuracy(rebuilt, np.asarray(held_out.labels)),
        num_held_out=len(unseen),
        num_samples=len(images),
        guidance=pipeline.defaults.words(),
        seed=options.seed,
        seconds_per_image=seconds,
        first_preview=first_preview,
        model=pipeline.fingerprint,
    )
    write_atomically(record, json.dumps(asdict(scores), indent=2))
    return scores


def images_of(source: ImageSource, image_size: int) -> Tensor:
    """All images of a split as they are evaluated, in [-1, 1]."""
    views = EvaluationImages(source, image_size)
    return torch.stack([torch.as_tensor(views[i]["image"]) for i in range(len(views))])


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


def draw_previews(pipeline: DARPipeline, names: Sequence[str], options: DemoOptions) -> float:
    """One image of each class after every solver step; returns when the first preview came, as a share of the whole."""
    labels = list(range(pipeline.num_classes))
    # the first image of every class in samples.png
    index = [label * SAMPLES_PER_CLASS for label in labels]
    steps: list[Sequence[Image.Image]] = []
    for step in pipeline.stream(labels, seed=options.seed, image_index=index):
        assert isinstance(step.preview, list), "stream yields PIL images by default"
        steps.append(step.preview)
    columns = pipeline.step_names(len(steps))
    picture = table(list(zip(*steps, strict=True)), row_names=names, column_names=[c.split()[0] for c in columns])
    save_picture(picture, options.folder / "previews.png")
    return float(np.median([first_preview_share(pipeline, options.seed) for _ in range(_TIMINGS)]))


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
