"""Curves and the report of the D-AR demo."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

import isthmus
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.demo.stages import precisions
from isthmus.pipelines.dar import DARPipeline
from isthmus.training.logs import LogLines, column, last
from isthmus.training.run import write_atomically

if TYPE_CHECKING:
    from isthmus.demo.dar import DARScores


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
