"""The demo of the next-scale family: tokenizer, SRDD prior, samples and a report."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

import isthmus
from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.demo.stages import (
    LONGER,
    SAMPLES_PER_CLASS,
    SHOWN_PER_CLASS,
    ClassJudge,
    ClassScores,
    Clock,
    draw_samples,
    precisions,
    stage_run,
)
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.runs import prior_preset, tokenizer_preset
from isthmus.next_scale.train_tokenizer import save_previews
from isthmus.nn.stored_llama import fingerprint
from isthmus.pictures import save_picture, table, to_pil
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.run import LogLines, column, last, read_log, write_atomically
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer


def draw_curves(tokenizer_log: LogLines, prior_log: LogLines, scale_sizes: tuple[int, ...], path: Path) -> None:
    """Four panels: PSNR and codebook usage of the tokenizer; bits per token of the prior, in all and per scale."""
    # imported here: matplotlib belongs to the extra `demo`, and `isthmus demo --help` does without
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    (psnr, usage), (bits, by_scale) = figure.subplots(2, 2)
    psnr.plot(*column(tokenizer_log, "val/psnr"), marker="o")
    psnr.set(title="tokenizer: PSNR on held-out images", ylabel="dB")
    usage.plot(*column(tokenizer_log, "val/usage"), marker="o", label="held-out images")
    usage.plot(*column(tokenizer_log, "train/usage"), label="training (moving average)")
    usage.set(title="tokenizer: share of codes in use", ylim=(0, 1.02))
    usage.legend()
    bits.plot(*column(prior_log, "train/bits_per_token"), alpha=0.6, label="training (one batch)")
    bits.plot(*column(prior_log, "val/bits_per_token"), marker="o", label="held-out images")
    bits.set(title="prior: bits per token", ylabel="bits")
    bits.legend()
    for k, size in enumerate(scale_sizes):
        by_scale.plot(*column(prior_log, f"val/bits_scale{k}"), label=f"{size} x {size}")
    by_scale.set(title="prior: bits per token by scale, held-out images", ylabel="bits")
    by_scale.legend(ncols=2)
    for panel in (psnr, usage, bits, by_scale):
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def write_report(
    options: DemoOptions,
    pipeline: NextScalePipeline,
    train: ImageSource,
    scores: "DemoScores",
    tokenizer_log: LogLines,
    prior_log: LogLines,
    seconds: dict[str, float],
) -> None:
    """report.md: pictures, numbers with everything that made them, and what to try next."""
    sizes, codebook_size = pipeline.schedule.sizes, pipeline.image_tokenizer.config["codebook_size"]
    params = {n: sum(p.numel() for p in getattr(pipeline, n).parameters()) for n in ("image_tokenizer", "transformer")}
    ratio = scores.class_accuracy / max(scores.class_accuracy_held_out, 1e-9)
    bits = " | ".join(f"{last(prior_log, f'val/bits_scale{k}'):.2f}" for k in range(len(sizes)))
    psnr = " | ".join(f"{last(tokenizer_log, f'val/psnr_scale{k}'):.1f}" for k in range(len(sizes)))
    by_class = ", ".join(f"{name} {share:.0%}" for name, share in scores.accuracy_by_class.items())
    phases = "\n".join(f"| {phase} | {value:.0f} |" for phase, value in seconds.items())
    text = f"""# Isthmus demo

An SRDD model trained from nothing on {len(train)} drawings of {len(train.class_names)} classes
({", ".join(train.class_names)}), {pipeline.image_tokenizer.image_size} px, seed {options.seed}.

![samples](samples.png)

Rows are classes. One image of each class, coarse to fine:

![scales](scales.png)

Held-out images, rebuilt from the first scales and from all of them; the image itself is last:

![reconstructions](reconstructions.png)

![curves](curves.png)

## Numbers

| | |
|---|---|
| tokenizer | {params["image_tokenizer"]:,} parameters |
| PSNR on held-out images | {last(tokenizer_log, "val/psnr"):.2f} dB |
| codes that held-out images use | {last(tokenizer_log, "val/usage"):.0%} of {codebook_size} |
| prior | {params["transformer"]:,} parameters |
| bits per token on held-out images | {last(prior_log, "val/bits_per_token"):.3f} |
| class accuracy of {scores.num_samples} samples | {scores.class_accuracy:.1%} ({by_class}) |
| class accuracy of held-out images | {scores.class_accuracy_held_out:.1%} |
| samples over held-out | {ratio:.1%} |
| samples that look copied | {scores.memorised:.1%} |
| training images, shifted and mirrored, that look copied | {scores.memorised_views:.1%} |
| drawing one image | {scores.seconds_per_image * 1000:.0f} ms |

Class accuracy: the nearest class mean among {len(train.class_names)} classes on pooled 192-d features of
EfficientNet-Lite0 at native size, means of the training images. A sample looks copied if it is nearer to a training
image than 99 % of the held-out images are; the row below it says what this search finds of true copies, so a small
share is no acquittal. Samples: seed {scores.seed}, {scores.guidance}.

| scale | {" | ".join(f"{s} x {s}" for s in sizes)} |
|---|{"---|" * len(sizes)}
| PSNR up to this scale, dB | {psnr} |
| bits per token | {bits} |

| phase | seconds |
|---|---|
{phases}
| all | {sum(seconds.values()):.0f} |

Isthmus {isthmus.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads. Products of the trainings:
{precisions(options.folder)}.

## Next

```
isthmus sample {options.folder}/model --classes {train.class_names[0]} --num 16 --seed 1 --out samples --grid --strip
isthmus info {options.folder}/model
isthmus train prior --from {options.folder}/model --data folder:PATH_TO_YOUR_IMAGES --out mine
isthmus demo --classes all --out demo-all
isthmus demo --family dar
```

{train.attribution}
"""
    write_atomically(options.folder / "report.md", text)


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
    shown = save_previews(pipeline.image_tokenizer, EvaluationImages(held_out, pipeline.image_size), folder, 0)
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
