"""`isthmus demo`: images, tokenizer, prior, samples and a report of them, on a laptop, without a network.

What is finished is used again: every stage looks for what an earlier run of the demo left.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import isthmus
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.runs import diffusion_tokenizer_preset, next_token_prior_preset
from isthmus.data.batches import EvaluationImages
from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.evaluation.classes import NearestClassMean
from isthmus.evaluation.features import extract_features, feature_network, sample_features
from isthmus.evaluation.held_out import as_floats
from isthmus.evaluation.reference import open_splits
from isthmus.evaluation.report import markdown_table
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
from isthmus.training.run import LogLines, column, last, read_log
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("isthmus")

T = TypeVar("T")
DATA, IMAGE_SIZE_PX = "openmoji", 32
SAMPLES_PER_CLASS = 50
SHOWN_PER_CLASS = 10
# `--budget long` trains so many times longer
LONGER = 4

Scores = dict[str, Any]
"""What the demo measures on its samples, as `isthmus evaluate` does, and how they were drawn: scores.json.

Shares of samples: `class_accuracy` (the nearest class mean is that of the own class), and `memorised` (nearer to a
training image than 99 % of held-out images are); `memorised_views` are true copies, shifted and mirrored as training
sees them. Of D-AR also held-out images, dB: `psnr` from their own codes, `psnr_shuffled` from another image's,
`psnr_small` shrunk to 4 x 4 and back; `first_preview` is a share of the time of a single image.
"""


@alone_in("options.folder")
def run_demo(options: DemoOptions) -> Path:
    """Run every stage that is not finished yet and write `report.md`; returns the folder.

    Raises `UserError` for an unknown class, or where the folder holds something else.
    """
    folder, clock = options.folder, Clock(options.folder / "seconds.json")
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
        logger.info("2/4 tokenizer: pixels to a sequence of tokens, groups of which drive the steps of a diffusion")
        first, second = diffusion_tokenizer_preset("dar-small-32"), next_token_prior_preset("dar-prior-small")
        # a prior of so few images overfits long before a tokenizer does
        words, longer = "a Llama that predicts the next token", 3
    else:
        logger.info("2/4 tokenizer: pixels to tokens of six scales")
        first, second = tokenizer_preset("small-32"), prior_preset("srdd-small")
        words, longer = "an SRDD transformer that predicts each scale from the one before", LONGER
    clock.time("tokenizer", lambda: train_tokenizer(stage_run(first, options, "tokenizer", longer=LONGER)))

    logger.info("3/4 prior: %s", words)
    tokenizer = str(folder / "tokenizer")
    clock.time("prior", lambda: train_prior(stage_run(second, options, "model", longer=longer, tokenizer=tokenizer)))

    logger.info("4/4 samples, pictures and report")
    pipeline = load_pipeline(str(folder / "model"), device="cpu")
    model = pipeline.fingerprint if isinstance(pipeline, DARPipeline) else fingerprint(pipeline.transformer)
    record = folder / "scores.json"
    scores: Scores | None = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if scores is None or (scores["seed"], scores["model"]) != (options.seed, model):
        if scores is not None and scores["seed"] == options.seed:
            # they are of another model
            shutil.rmtree(folder / "samples", ignore_errors=True)
        samples = clock.time("drawing", lambda: draw_samples(pipeline, options))

        def finish() -> Scores:
            size = pipeline.image_size
            splits = open_splits(DATA, image_size=size, classes=options.chosen_classes or (), wanted=())
            real = RealImages.of(feature_network("lite0"), splits, size=(size, size))
            figures = {**sample_figures(real, samples, pipeline, options, clock), "model": model}
            if isinstance(pipeline, DARPipeline):
                return figures | dar_figures(pipeline, real, len(samples), options)
            draw_scales(pipeline, held_out, options)
            return figures

        scores = clock.time("samples", finish)
        write_whole(record, json.dumps(scores, indent=2))
    if isinstance(pipeline, DARPipeline):
        draw_curves(folder, None)
        dar_report(options, pipeline, train, scores, clock.seconds)
    else:
        draw_curves(folder, pipeline.schedule.sizes)
        next_scale_report(options, pipeline, train, scores, clock.seconds)
    logger.info("done in %.0f s: see %s", sum(clock.seconds.values()), folder / "report.md")
    return folder


def draw_scales(pipeline: NextScalePipeline, held_out: ImageSource, options: DemoOptions) -> None:
    """scales.png and reconstructions.png."""
    columns = [f"{size} x {size}" for size in pipeline.schedule.sizes]
    draw_previews(pipeline, held_out.class_names, options, columns, "scales.png")
    shown = save_previews(pipeline.image_tokenizer, EvaluationImages(held_out, pipeline.image_size), options.folder, 0)
    shown.replace(options.folder / "reconstructions.png")


_PREFIX_SHARES = (0, 1 / 32, 3 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Tokens of the layout strip, as shares of all: 0, 8, 12, 16, 32, 64 and 128 of 256."""
_SMALL_SIDE_PX = 4
_TIMINGS = 5


def dar_figures(pipeline: DARPipeline, real: RealImages, num_samples: int, options: DemoOptions) -> Scores:
    """Picture samples and held-out images, and measure these through the tokens."""
    assert real.splits is not None and real.splits.held_out.labels is not None, "the data set has classes"
    held_out, names, headline = real.splits.held_out, list(real.splits.class_names), next(iter(real.network.spaces))
    unseen, labels = as_floats(np.stack(list(held_out))), real.splits.held_out.labels
    first_preview = draw_dar_previews(pipeline, names, options)
    rebuilt, shuffled = reconstructions(pipeline, unseen)
    draw_reconstructions(unseen, rebuilt, labels, options)
    # whatever comes first, its layout is what the others take on
    draw_layouts(pipeline, unseen[:1], names, options)
    training = real.measured(num_samples).training
    assert training is not None, "there is a data set"
    judge = NearestClassMean.fit(training.rows, training.labels)
    features = extract_features(real.network, to_uint8(rebuilt))[headline]
    return {
        "psnr": psnr(rebuilt, unseen).mean().item(),
        "psnr_shuffled": psnr(shuffled, unseen).mean().item(),
        "psnr_small": psnr(shrunk_and_back(unseen), unseen).mean().item(),
        "reconstruction_accuracy": float((judge.predict(features) == labels).mean()),
        "num_held_out": len(unseen),
        "first_preview": first_preview,
    }


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


def sample_figures(
    real: RealImages, samples: Samples, pipeline: AnyPipeline, options: DemoOptions, clock: Clock
) -> Scores:
    """What is measured on the samples of every model."""
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
    """previews.png, by number of tokens; returns after which share of an image's time its first preview is there."""
    columns = pipeline.step_names(pipeline.scheduler.config["num_inference_steps"])
    draw_previews(pipeline, names, options, [name.split()[0] for name in columns], "previews.png")
    shares = []
    for _ in range(_TIMINGS):
        start = time.perf_counter()
        times = [time.perf_counter() - start for _ in pipeline.stream(0, seed=options.seed)]
        shares.append(times[0] / times[-1])
    return float(np.median(shares))


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


def draw_layouts(pipeline: DARPipeline, reference: Tensor, names: Sequence[str], options: DemoOptions) -> None:
    """Rows = labels, columns = how many first tokens of the reference are kept; the reference itself comes last."""
    total = pipeline.token_layout.num_tokens
    lengths = sorted({round(share * total) for share in _PREFIX_SHARES})
    rows = []
    for label in range(pipeline.num_classes):
        labels = [label] * len(lengths)
        output = pipeline(labels, prefix_image=reference, prefix_tokens=lengths, seed=options.seed, image_index=labels)
        assert isinstance(output.images, list), "a call returns PIL images by default"
        rows.append([*output.images, *to_pil(reference)])
    columns = [*(str(length) for length in lengths), "image"]
    save_picture(table(rows, row_names=names, column_names=columns), options.folder / "layout.png")


def logs_of(folder: Path) -> tuple[LogLines, LogLines]:
    """Those of the tokenizer and of the prior."""
    return read_log(folder / "tokenizer" / "log.jsonl"), read_log(folder / "model" / "log.jsonl")


def draw_curves(folder: Path, scale_sizes: Sequence[int] | None) -> None:
    """curves.png: PSNR and codebook usage of the tokenizer, bits per token of the prior; bits by scale, or losses."""
    # imported here: matplotlib belongs to the extra `demo`, and `isthmus demo --help` does without
    from matplotlib.figure import Figure

    tokenizer_log, prior_log = logs_of(folder)
    figure = Figure(figsize=(11, 6), layout="constrained")
    (quality, usage), (bits, other) = figure.subplots(2, 2)
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
    _draw(quality, tokenizer_log, psnr_names, title="tokenizer: PSNR of held-out images", ylabel="dB")
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
    decibels = " | ".join(f"{last(tokenizer_log, f'val/psnr_scale{k}'):.1f}" for k in range(len(sizes)))
    _write(
        options, pipeline, train, scores, seconds,
        title="Isthmus demo",
        model="An SRDD model trained",
        pictures="""Rows are classes. One image of each class, coarse to fine:

![scales](scales.png)

Held-out images, rebuilt from the first scales and from all of them; the image itself is last:

![reconstructions](reconstructions.png)""",
        rows={"PSNR on held-out images": f"{last(tokenizer_log, 'val/psnr'):.2f} dB"},
        below=f"""| scale | {" | ".join(f"{s} x {s}" for s in sizes)} |
|---|{"---|" * len(sizes)}
| PSNR up to this scale, dB | {decibels} |
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
    ratio = scores["class_accuracy"] / max(scores["class_accuracy_held_out"], 1e-9)
    by_class = ", ".join(f"{name} {share:.0%}" for name, share in scores["accuracy_by_class"].items())
    numbers = {
        **parameters,
        **rows,
        "codes that held-out images use": f"{last(tokenizer_log, 'val/usage'):.0%} of {codes}",
        "bits per token on held-out images": f"{last(prior_log, 'val/bits_per_token'):.3f}",
        "class accuracy of held-out images": f"{scores['class_accuracy_held_out']:.1%}",
        f"class accuracy of {scores['num_samples']} samples": f"{scores['class_accuracy']:.1%} ({by_class})",
        "the same as a share of that of held-out images": f"{ratio:.1%}",
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
