"""`isthmus demo`: images, tokenizer, SRDD prior, samples and a report, on a laptop, without a network."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from isthmus.data.batches import EvaluationImages
from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.demo.report import draw_curves, read_log, write_report
from isthmus.evaluation.features import Lite0Arrays, NearestClassMean, lite0_features, memorised_share
from isthmus.models.efficientnet_lite import EfficientNetLite0
from isthmus.models.fingerprint import fingerprint
from isthmus.pictures import save_picture, table, to_pil
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.presets import prior_preset, tokenizer_preset
from isthmus.training.previews import save_reconstructions
from isthmus.training.run import write_atomically
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

logger = logging.getLogger("isthmus")
T = TypeVar("T")

IMAGE_SIZE_PX = 32
SAMPLES_PER_CLASS = 50
SHOWN_PER_CLASS = 10


@dataclass(frozen=True)
class DemoScores:
    """What the demo measures on its samples; features are those of EfficientNet-Lite0 at native size.

    Attributes:
        num_samples: images drawn, the same number of each class.
        guidance, seed: how they were drawn.
        class_accuracy: share of samples whose nearest class mean is their own class.
        class_accuracy_held_out: the same for held-out images, the ceiling.
        accuracy_by_class: class name -> share, of the samples.
        memorised: share of samples nearer to a training image than 99 % of held-out images are.
        seconds_per_image: drawing, pixels included.
        model: fingerprint of the transformer.
    """

    num_samples: int
    guidance: str
    seed: int
    class_accuracy: float
    class_accuracy_held_out: float
    accuracy_by_class: dict[str, float]
    memorised: float
    seconds_per_image: float
    model: str


def run_demo(options: DemoOptions) -> Path:
    """Run every stage that is not finished yet and write `report.md`; returns the folder.

    Raises:
        UserError: an unknown class, or the folder holds something else.
    """
    classes = None if tuple(options.classes) == ("all",) else tuple(options.classes)
    clock = Clock(options.out / "seconds.json")
    logger.info("1/4 images: openmoji at %d px", IMAGE_SIZE_PX)
    train, held_out = clock.time(
        "images",
        lambda: tuple(
            open_source("openmoji", image_size=IMAGE_SIZE_PX, split=split, classes=classes)
            for split in ("train", "val")
        ),
    )
    logger.info("    %d images to train on, %d held out: %s", len(train), len(held_out), ", ".join(train.class_names))

    logger.info("2/4 tokenizer: pixels to tokens of six scales")
    tokenizer_run = replace(
        tokenizer_preset("small-32"), classes=classes, seed=options.seed, out=options.out / "tokenizer"
    )
    clock.time("tokenizer", lambda: train_tokenizer(tokenizer_run))

    logger.info("3/4 prior: an SRDD transformer that predicts each scale from the one before")
    prior_run = replace(
        prior_preset("srdd-small"),
        classes=classes,
        seed=options.seed,
        tokenizer=str(options.out / "tokenizer"),
        out=options.out / "model",
    )
    clock.time("prior", lambda: train_prior(prior_run))

    logger.info("4/4 samples, pictures and report")
    pipeline = load_pipeline(str(options.out / "model"), device="cpu")
    scores = clock.time("samples", lambda: finish(options, pipeline, train, held_out))
    tokenizer_log, prior_log = (read_log(options.out / name / "log.jsonl") for name in ("tokenizer", "model"))
    draw_curves(tokenizer_log, prior_log, pipeline.schedule.sizes, options.out / "curves.png")
    write_report(options, pipeline, train, scores, tokenizer_log, prior_log, clock.seconds)
    logger.info("done in %.0f s: see %s", sum(clock.seconds.values()), options.out / "report.md")
    return options.out


class Clock:
    """Seconds per phase, kept in a file: a stage that was finished earlier keeps the time it took then."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def time(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` and note how long it took, unless an earlier run took longer (it did the work)."""
        start = time.perf_counter()
        result = work()
        self.seconds[phase] = round(max(time.perf_counter() - start, self.seconds.get(phase, 0.0)), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.seconds))
        return result


def finish(options: DemoOptions, pipeline: NextScalePipeline, train: ImageSource, held_out: ImageSource) -> DemoScores:
    """Draw, measure and picture the samples; a finished stage of the same model and seed is used again."""
    record = options.out / "scores.json"
    model = fingerprint(pipeline.transformer)
    if record.is_file():
        before = DemoScores(**json.loads(record.read_text()))
        if (before.model, before.seed) == (model, options.seed):
            return before
    start = time.perf_counter()
    images, labels = draw_samples(pipeline, options.seed)
    seconds = (time.perf_counter() - start) / len(images)
    rows = [images[labels == label][:SHOWN_PER_CLASS] for label in range(pipeline.num_classes)]
    names = list(train.class_names)
    save_picture(table([to_pil(row) for row in rows], row_names=names), options.out / "samples.png")
    draw_scales(pipeline, names, options)
    shown = save_reconstructions(pipeline.image_tokenizer, held_out, options.out, 0)
    shown.replace(options.out / "reconstructions.png")

    network = EfficientNetLite0()
    real, unseen, drawn = (features_of(kind, network) for kind in (train, held_out, images))
    means = NearestClassMean.fit(real.pooled_192, train.labels)
    found = means.predict(drawn.pooled_192)
    scores = DemoScores(
        num_samples=len(images),
        guidance=json.dumps(pipeline.defaults.to_dict()),
        seed=options.seed,
        class_accuracy=float((found == labels).mean()),
        class_accuracy_held_out=means.accuracy(unseen.pooled_192, held_out.labels),
        accuracy_by_class={n: float((found[labels == i] == i).mean()) for i, n in enumerate(names)},
        memorised=memorised_share(drawn.pooled_192, real.pooled_192, unseen.pooled_192),
        seconds_per_image=seconds,
        model=model,
    )
    write_atomically(record, json.dumps(asdict(scores), indent=2))
    return scores


def draw_samples(pipeline: NextScalePipeline, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images in [-1, 1] and labels, the same number of each class; image i is image i of the seed."""
    labels = [label for label in range(pipeline.num_classes) for _ in range(SAMPLES_PER_CLASS)]
    parts = []
    for start in tqdm(range(0, len(labels), SAMPLES_PER_CLASS), desc="samples", unit="class", disable=None):
        chosen = labels[start : start + SAMPLES_PER_CLASS]
        output = pipeline(chosen, seed=seed, image_index=start, output_type="pt")
        parts.append(torch.as_tensor(output.images) * 2 - 1)
    return torch.cat(parts), np.array(labels)


def features_of(images: "ImageSource | torch.Tensor", network: EfficientNetLite0) -> Lite0Arrays:
    """Lite0 features of a split, as it is evaluated, or of drawn images."""
    if isinstance(images, torch.Tensor):
        return lite0_features(images, network=network)
    views = EvaluationImages(images, IMAGE_SIZE_PX)
    return lite0_features((torch.as_tensor(views[i]["image"]) for i in range(len(views))), network=network)


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
    save_picture(picture, options.out / "scales.png")
