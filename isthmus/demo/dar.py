"""The demo of the D-AR family: diffusion tokenizer, Llama prior, samples, previews, layout control and a report."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import isthmus
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.runs import diffusion_tokenizer_preset, next_token_prior_preset
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
from isthmus.nn.perceptual import psnr
from isthmus.pictures import save_picture, table, to_pil
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.run import LogLines, column, last, read_log, write_atomically
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer


def draw_dar_curves(tokenizer_log: LogLines, prior_log: LogLines, path: Path) -> None:
    """Four panels: PSNR with right and wrong codes, losses and codebook usage of the tokenizer; bits of the prior."""
    # imported here: matplotlib belongs to the extra `demo`, and `isthmus demo --help` does without
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    (quality, losses), (usage, bits) = figure.subplots(2, 2)
    quality.plot(*column(tokenizer_log, "val/psnr"), marker="o", label="their own codes")
    quality.plot(*column(tokenizer_log, "val/psnr_shuffled"), marker="o", label="another image's codes")
    quality.set(title="tokenizer: PSNR of held-out images", ylabel="dB")
    quality.legend()
    for name in ("flow", "jump", "canvas"):
        losses.plot(*column(tokenizer_log, f"train/{name}"), label=name)
    losses.set(title="tokenizer: losses", yscale="log")
    losses.legend()
    usage.plot(*column(tokenizer_log, "val/usage"), marker="o", label="held-out images")
    usage.plot(*column(tokenizer_log, "train/usage"), label="training (moving average)")
    usage.set(title="tokenizer: share of codes in use", ylim=(0, 1.02))
    usage.legend()
    bits.plot(*column(prior_log, "train/bits_per_token"), alpha=0.6, label="training")
    bits.plot(*column(prior_log, "val/bits_per_token"), marker="o", label="held-out images")
    bits.set(title="prior: bits per token", ylabel="bits")
    bits.legend()
    for panel in (quality, losses, usage, bits):
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    temporary = path.with_name(path.name + ".partial")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def write_dar_report(
    options: DemoOptions,
    pipeline: DARPipeline,
    train: ImageSource,
    scores: "DARScores",
    tokenizer_log: LogLines,
    prior_log: LogLines,
    seconds: dict[str, float],
) -> None:
    """report.md: pictures, numbers with everything that made them, and what to try next."""
    parts = ("image_tokenizer", "decoder", "transformer")
    params = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in parts}
    by_class = ", ".join(f"{name} {share:.0%}" for name, share in scores.accuracy_by_class.items())
    phases = "\n".join(f"| {phase} | {value:.0f} |" for phase, value in seconds.items())
    layout, scheduler = pipeline.token_layout, pipeline.scheduler.config
    text = f"""# Isthmus demo: D-AR

A Llama whose tokens drive the steps of a pixel diffusion, trained from nothing on {len(train)} drawings of
{len(train.class_names)} classes ({", ".join(train.class_names)}), {pipeline.image_size} px, seed {options.seed},
budget {options.budget}: {layout.num_tokens} tokens of {layout.codebook_size} codes, {scheduler["num_inference_steps"]}
solver steps ({scheduler["solver"]}).

![samples](samples.png)

Rows are classes. One image of each class while it is drawn: the columns say how many tokens existed.

![previews](previews.png)

Held-out images, what their tokens give back, and the same images shrunk to 4 x 4:

![reconstructions](reconstructions.png)

Layout control: the first tokens of one held-out image (last column) are kept, as many as the column says; the others
are drawn under the label of the row.

![layout](layout.png)

![curves](curves.png)

## Numbers

| | |
|---|---|
| tokenizer | {params["image_tokenizer"]:,} parameters |
| pixel decoder | {params["decoder"]:,} parameters |
| prior | {params["transformer"]:,} parameters |
| PSNR of {scores.num_held_out} held-out images from their own codes | {scores.psnr:.2f} dB |
| from another image's codes | {scores.psnr_shuffled:.2f} dB |
| gap | {scores.psnr - scores.psnr_shuffled:.2f} dB |
| images shrunk to 4 x 4 and back | {scores.psnr_small:.2f} dB |
| codes that held-out images use | {last(tokenizer_log, "val/usage"):.0%} of {layout.codebook_size} |
| bits per token on held-out images | {last(prior_log, "val/bits_per_token"):.3f} |
| class accuracy of held-out images | {scores.class_accuracy_held_out:.1%} |
| class accuracy of their reconstructions | {scores.reconstruction_accuracy:.1%} |
| class accuracy of {scores.num_samples} samples | {scores.class_accuracy:.1%} ({by_class}) |
| samples that look copied | {scores.memorised:.1%} |
| training images, shifted and mirrored, that look copied | {scores.memorised_views:.1%} |
| drawing one image, in batches of 50 | {scores.seconds_per_image * 1000:.0f} ms |
| first preview of a single image | after {scores.first_preview:.0%} of its time |

Class accuracy: the nearest class mean among {len(train.class_names)} classes on pooled 192-d features of
EfficientNet-Lite0 at native size, means of the training images. A sample looks copied if it is nearer to a training
image than 99 % of the held-out images are; the row below it says what this search finds of true copies, so a small
share is no acquittal. Samples: seed {scores.seed}, {scores.guidance}.

| phase | seconds |
|---|---|
{phases}
| all | {sum(seconds.values()):.0f} |

Isthmus {isthmus.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads. Products of the trainings:
{precisions(options.folder)}.

## Next

```
isthmus sample {options.folder}/model --classes {train.class_names[0]} --num 16 --seed 1 --out samples --grid --strip
isthmus export llama {options.folder}/model --out llama
isthmus train prior --from {options.folder}/model --data folder:PATH_TO_YOUR_IMAGES --out mine
isthmus demo --family dar --budget long
```

{train.attribution}
"""
    write_atomically(options.folder / "report.md", text)


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
    clock.time("tokenizer", lambda: train_tokenizer(tokenizer_run))

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
