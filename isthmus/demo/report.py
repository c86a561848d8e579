"""report.md of the demo: pictures, curves, and numbers with everything that made them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import isthmus
from isthmus.dar.pipeline import DARPipeline
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.files import write_whole
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.training.run import LogLines, column, last


@dataclass(frozen=True, kw_only=True)
class DemoScores:
    """What the demo measures on its samples, as `isthmus evaluate` does, and how they were drawn.

    Attributes:
        class_accuracy: share of samples whose nearest class mean is their own class.
        class_accuracy_held_out: the same for held-out images, which are real.
        accuracy_by_class: class name -> share, of the samples.
        memorised: share of samples nearer to a training image than 99 % of held-out images are.
        memorised_views: the same of training images, shifted and mirrored as training sees them: what this search finds
            of true copies.
        num_samples: images drawn, the same number of each class.
        guidance, seed: how they were drawn.
        seconds_per_image: drawing, pixels and files included.
        model: fingerprint of what drew them.
    """

    class_accuracy: float
    class_accuracy_held_out: float
    accuracy_by_class: dict[str, float]
    memorised: float
    memorised_views: float
    num_samples: int
    guidance: str
    seed: int
    seconds_per_image: float
    model: str


@dataclass(frozen=True, kw_only=True)
class DARScores(DemoScores):
    """And on held-out images through the tokens of a D-AR model.

    Attributes:
        psnr: of held-out images from their own codes, dB, mean over images.
        psnr_shuffled: of held-out images from another image's codes.
        psnr_small: of held-out images shrunk to 4 x 4 and back, what a handful of colours gives.
        reconstruction_accuracy: share of reconstructed held-out images whose nearest class mean is their own class.
        num_held_out: images these are measured on.
        first_preview: share of the time of a single image after which its first preview is there.
    """

    psnr: float
    psnr_shuffled: float
    psnr_small: float
    reconstruction_accuracy: float
    num_held_out: int
    first_preview: float


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
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_dar_curves(tokenizer_log: LogLines, prior_log: LogLines, path: Path) -> None:
    """Four panels: PSNR with right and wrong codes, losses and codebook usage of the tokenizer; bits of the prior."""
    # imported here: see above
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
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


def next_scale_report(
    options: DemoOptions,
    pipeline: NextScalePipeline,
    train: ImageSource,
    scores: DemoScores,
    tokenizer_log: LogLines,
    prior_log: LogLines,
    seconds: dict[str, float],
) -> None:
    """Write report.md of the next-scale demo."""
    sizes, codebook_size = pipeline.schedule.sizes, pipeline.image_tokenizer.config["codebook_size"]
    params = _parameters(pipeline, "image_tokenizer", "transformer")
    ratio = scores.class_accuracy / max(scores.class_accuracy_held_out, 1e-9)
    bits = " | ".join(f"{last(prior_log, f'val/bits_scale{k}'):.2f}" for k in range(len(sizes)))
    psnr = " | ".join(f"{last(tokenizer_log, f'val/psnr_scale{k}'):.1f}" for k in range(len(sizes)))
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
{_samples_rows(scores)}
| class accuracy of held-out images | {scores.class_accuracy_held_out:.1%} |
| samples over held-out | {ratio:.1%} |
{_copies_rows(scores)}
| drawing one image | {scores.seconds_per_image * 1000:.0f} ms |

{_how_measured(train, scores)}

| scale | {" | ".join(f"{s} x {s}" for s in sizes)} |
|---|{"---|" * len(sizes)}
| PSNR up to this scale, dB | {psnr} |
| bits per token | {bits} |

{_circumstances(options, seconds)}

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
    write_whole(options.folder / "report.md", text)


def dar_report(
    options: DemoOptions,
    pipeline: DARPipeline,
    train: ImageSource,
    scores: DARScores,
    tokenizer_log: LogLines,
    prior_log: LogLines,
    seconds: dict[str, float],
) -> None:
    """Write report.md of the D-AR demo."""
    params = _parameters(pipeline, "image_tokenizer", "decoder", "transformer")
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
{_samples_rows(scores)}
{_copies_rows(scores)}
| drawing one image, in batches of 50 | {scores.seconds_per_image * 1000:.0f} ms |
| first preview of a single image | after {scores.first_preview:.0%} of its time |

{_how_measured(train, scores)}

{_circumstances(options, seconds)}

## Next

```
isthmus sample {options.folder}/model --classes {train.class_names[0]} --num 16 --seed 1 --out samples --grid --strip
isthmus export llama {options.folder}/model --out llama
isthmus train prior --from {options.folder}/model --data folder:PATH_TO_YOUR_IMAGES --out mine
isthmus demo --family dar --budget long
```

{train.attribution}
"""
    write_whole(options.folder / "report.md", text)


def _parameters(pipeline: Any, *parts: str) -> dict[str, int]:
    return {name: sum(weight.numel() for weight in getattr(pipeline, name).parameters()) for name in parts}


def _samples_rows(scores: DemoScores) -> str:
    by_class = ", ".join(f"{name} {share:.0%}" for name, share in scores.accuracy_by_class.items())
    return f"| class accuracy of {scores.num_samples} samples | {scores.class_accuracy:.1%} ({by_class}) |"


def _copies_rows(scores: DemoScores) -> str:
    return (
        f"| samples that look copied | {scores.memorised:.1%} |\n"
        f"| training images, shifted and mirrored, that look copied | {scores.memorised_views:.1%} |"
    )


def _how_measured(train: ImageSource, scores: DemoScores) -> str:
    return f"""Class accuracy: the nearest class mean among {len(train.class_names)} classes on pooled 192-d features of
EfficientNet-Lite0 at native size, means of the training images. A sample looks copied if it is nearer to a training
image than 99 % of the held-out images are; the row below it says what this search finds of true copies, so a small
share is no acquittal. Samples: seed {scores.seed}, {scores.guidance}."""


def _circumstances(options: DemoOptions, seconds: dict[str, float]) -> str:
    phases = "\n".join(f"| {phase} | {value:.0f} |" for phase, value in seconds.items())
    return f"""| phase | seconds |
|---|---|
{phases}
| all | {sum(seconds.values()):.0f} |

Isthmus {isthmus.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads. Products of the trainings:
{_precisions(options.folder)}."""


def _precisions(folder: Path) -> str:
    """Type of the products of both trainings, and why, from what their runs recorded."""
    records = {
        name: json.loads((folder / name / "run.json").read_text(encoding="utf-8")) for name in ("tokenizer", "model")
    }
    return ", ".join(f"{name} {record['precision']['why']}" for name, record in records.items())
