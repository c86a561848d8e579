"""report.md of the demo: pictures, curves, and numbers with everything that made them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import isthmus
from isthmus.dar.pipeline import DARPipeline
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.evaluation.report import markdown_table
from isthmus.files import write_whole
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.training.run import LogLines, column, last, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Scores = dict[str, Any]
"""What the demo measures on its samples, as `isthmus evaluate` does, and how they were drawn: scores.json.

Shares of samples: `class_accuracy` (the nearest class mean is that of the own class), and `memorised` (nearer to a
training image than 99 % of held-out images are); `memorised_views` are true copies, shifted and mirrored as training
sees them. Of D-AR also held-out images, dB: `psnr` from their own codes, `psnr_shuffled` from another image's,
`psnr_small` shrunk to 4 x 4 and back; `first_preview` is a share of the time of a single image.
"""


def logs_of(folder: Path) -> tuple[LogLines, LogLines]:
    """Those of the tokenizer and of the prior."""
    return read_log(folder / "tokenizer" / "log.jsonl"), read_log(folder / "model" / "log.jsonl")


def draw_curves(folder: Path, scale_sizes: Sequence[int] | None) -> None:
    """curves.png: PSNR and codebook usage of the tokenizer, bits per token of the prior; bits by scale, or losses."""
    # imported here: matplotlib belongs to the extra `demo`, and `isthmus demo --help` does without
    from matplotlib.figure import Figure

    tokenizer_log, prior_log = logs_of(folder)
    figure = Figure(figsize=(11, 6), layout="constrained")
    (psnr, usage), (bits, other) = figure.subplots(2, 2)
    usage_names = {"val/usage": "held-out images", "train/usage": "training (moving average)"}
    _draw(usage, tokenizer_log, usage_names, title="tokenizer: share of codes in use", ylim=(0, 1.02))
    bits_names = {"train/bits_per_token": "training (one batch)", "val/bits_per_token": "held-out images"}
    _draw(bits, prior_log, bits_names, title="prior: bits per token", ylabel="bits")
    psnr_names = {"val/psnr": "their own codes"}
    if scale_sizes is None:
        psnr_names["val/psnr_shuffled"] = "another image's codes"
        names = {f"train/{name}": name for name in ("flow", "jump", "canvas")}
        _draw(other, tokenizer_log, names, title="tokenizer: losses", yscale="log")
    else:
        names = {f"val/bits_scale{k}": f"{size} x {size}" for k, size in enumerate(scale_sizes)}
        _draw(other, prior_log, names, title="prior: bits per token by scale, held-out images", ylabel="bits")
    _draw(psnr, tokenizer_log, psnr_names, title="tokenizer: PSNR of held-out images", ylabel="dB")
    write_whole(folder / "curves.png", lambda file: figure.savefig(file, format="png", dpi=110))


def _draw(panel: "Axes", log: LogLines, names: Mapping[str, str], **settings: Any) -> None:
    for name, label in names.items():
        panel.plot(*column(log, name), label=label, marker="o" if name.startswith("val/") else None, markersize=4)
    panel.set(xlabel="step", **settings)
    panel.grid(alpha=0.3)
    panel.legend(ncols=2 if len(names) > 3 else 1)


def next_scale_report(
    options: DemoOptions, pipeline: NextScalePipeline, train: ImageSource, scores: Scores, seconds: Mapping[str, float]
) -> None:
    """Write report.md of the next-scale demo."""
    sizes, (tokenizer_log, prior_log) = pipeline.schedule.sizes, logs_of(options.folder)
    bits = " | ".join(f"{last(prior_log, f'val/bits_scale{k}'):.2f}" for k in range(len(sizes)))
    psnr = " | ".join(f"{last(tokenizer_log, f'val/psnr_scale{k}'):.1f}" for k in range(len(sizes)))
    ratio = scores["class_accuracy"] / max(scores["class_accuracy_held_out"], 1e-9)
    _write(
        options, pipeline, train, scores, seconds,
        title="Isthmus demo",
        model="An SRDD model trained",
        pictures="""Rows are classes. One image of each class, coarse to fine:

![scales](scales.png)

Held-out images, rebuilt from the first scales and from all of them; the image itself is last:

![reconstructions](reconstructions.png)""",
        rows={
            "PSNR on held-out images": f"{last(tokenizer_log, 'val/psnr'):.2f} dB",
            "samples over held-out": f"{ratio:.1%}",
        },
        below=f"""| scale | {" | ".join(f"{s} x {s}" for s in sizes)} |
|---|{"---|" * len(sizes)}
| PSNR up to this scale, dB | {psnr} |
| bits per token | {bits} |

""",
        last_commands="isthmus demo --classes all --out demo-all\nisthmus demo --family dar",
    )  # fmt: skip


def dar_report(
    options: DemoOptions, pipeline: DARPipeline, train: ImageSource, scores: Scores, seconds: Mapping[str, float]
) -> None:
    """Write report.md of the D-AR demo."""
    layout, scheduler = pipeline.token_layout, pipeline.scheduler.config
    _write(
        options, pipeline, train, scores, seconds,
        title="Isthmus demo: D-AR",
        model=f"""A Llama whose tokens drive the steps of a pixel diffusion ({layout.num_tokens} tokens of
{layout.codebook_size} codes, {scheduler["num_inference_steps"]} solver steps, {scheduler["solver"]}), trained""",
        pictures="""Rows are classes. One image of each class while it is drawn, by the number of tokens that existed.

![previews](previews.png)

Held-out images, what their tokens give back, and the same images shrunk to 4 x 4:

![reconstructions](reconstructions.png)

Layout control: the first tokens of one held-out image (last column) are kept, as many as the column says; the others
are drawn under the label of the row.

![layout](layout.png)""",
        rows={
            f"PSNR of {scores['num_held_out']} held-out images from their own codes": f"{scores['psnr']:.2f} dB",
            "from another image's codes": f"{scores['psnr_shuffled']:.2f} dB",
            "gap": f"{scores['psnr'] - scores['psnr_shuffled']:.2f} dB",
            "images shrunk to 4 x 4 and back": f"{scores['psnr_small']:.2f} dB",
            "class accuracy of reconstructed held-out images": f"{scores['reconstruction_accuracy']:.1%}",
            "first preview of a single image": f"after {scores['first_preview']:.0%} of its time",
        },
        below="",
        last_commands=f"""isthmus export llama {options.folder}/model --out llama
isthmus demo --family dar --budget long""",
    )  # fmt: skip


def _write(
    options: DemoOptions,
    pipeline: NextScalePipeline | DARPipeline,
    train: ImageSource,
    scores: Scores,
    seconds: Mapping[str, float],
    *,
    title: str,
    model: str,
    pictures: str,
    rows: Mapping[str, str],
    below: str,
    last_commands: str,
) -> None:
    tokenizer_log, prior_log = logs_of(options.folder)
    parts = {"image_tokenizer": "tokenizer", "decoder": "pixel decoder", "transformer": "prior"}
    parameters = {
        words: f"{sum(weight.numel() for weight in getattr(pipeline, part).parameters()):,} parameters"
        for part, words in parts.items()
        if hasattr(pipeline, part)
    }
    codes = pipeline.image_tokenizer.config["codebook_size"]
    by_class = ", ".join(f"{name} {share:.0%}" for name, share in scores["accuracy_by_class"].items())
    numbers = {
        **parameters,
        **rows,
        "codes that held-out images use": f"{last(tokenizer_log, 'val/usage'):.0%} of {codes}",
        "bits per token on held-out images": f"{last(prior_log, 'val/bits_per_token'):.3f}",
        "class accuracy of held-out images": f"{scores['class_accuracy_held_out']:.1%}",
        f"class accuracy of {scores['num_samples']} samples": f"{scores['class_accuracy']:.1%} ({by_class})",
        "samples that look copied": f"{scores['memorised']:.1%}",
        "training images, shifted and mirrored, that look copied": f"{scores['memorised_views']:.1%}",
        "drawing one image, in batches of 50": f"{scores['seconds_per_image'] * 1000:.0f} ms",
    }
    phases = [(phase, f"{value:.0f}") for phase, value in (*seconds.items(), ("all", sum(seconds.values())))]
    text = f"""# {title}

{model} from nothing on {len(train)} drawings of {len(train.class_names)} classes
({", ".join(train.class_names)}), {pipeline.image_size} px, seed {options.seed}, budget {options.budget}.

![samples](samples.png)

{pictures}

![curves](curves.png)

## Numbers

{markdown_table(("", ""), list(numbers.items()))}

Class accuracy: the nearest class mean among {len(train.class_names)} classes on pooled 192-d features of
EfficientNet-Lite0 at native size, means of the training images. A sample looks copied if it is nearer to a training
image than 99 % of the held-out images are; the row below it says what this search finds of true copies, so a small
share is no acquittal. Samples: seed {scores["seed"]}, {scores["guidance"]}.

{below}{markdown_table(("phase", "seconds"), phases)}

Isthmus {isthmus.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads. Products of the trainings:
{_precisions(options.folder)}.

## Next

```
isthmus sample {options.folder}/model --classes {train.class_names[0]} --num 16 --seed 1 --out samples --grid --strip
isthmus info {options.folder}/model
isthmus train prior --from {options.folder}/model --data folder:PATH_TO_YOUR_IMAGES --out mine
{last_commands}
```

{train.attribution}
"""
    write_whole(options.folder / "report.md", text)


def _precisions(folder: Path) -> str:
    """Type of the products of both trainings, and why, from what their runs recorded."""
    records = {
        name: json.loads((folder / name / "run.json").read_text(encoding="utf-8")) for name in ("tokenizer", "model")
    }
    return ", ".join(f"{name} {record['precision']['why']}" for name, record in records.items())
