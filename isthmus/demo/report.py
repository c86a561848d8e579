"""Curves and the report of the demo."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

import isthmus
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.demo.stages import precisions
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.training.logs import LogLines, column, last
from isthmus.training.run import write_atomically

if TYPE_CHECKING:
    from isthmus.demo.next_scale import DemoScores


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
