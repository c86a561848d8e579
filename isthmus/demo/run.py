"""`isthmus demo`: images, tokenizer, prior, samples, scores and a report of them, on a laptop, without a network.

What is finished is used again: every stage looks for what an earlier run of the demo left.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image

import isthmus
from isthmus.dar.pipeline import DARPipeline
from isthmus.dar.runs import diffusion_tokenizer_preset, next_token_prior_preset
from isthmus.data.avatars import Avatars
from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.evaluation.alignment import held_out_combinations
from isthmus.evaluation.evaluate import evaluate_model
from isthmus.evaluation.record import RECORD, EvaluationRecord, Score, read_record
from isthmus.evaluation.report import ATTRIBUTES, markdown_table, number
from isthmus.files import alone_in, write_whole
from isthmus.next_scale.runs import prior_preset, tokenizer_preset
from isthmus.pictures import save_picture, table
from isthmus.pipelines.loading import AnyPipeline, load_pipeline
from isthmus.training.config import Run
from isthmus.training.run import LogLines, column, last, read_log
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("isthmus")

T = TypeVar("T")
StageRun = TypeVar("StageRun", bound=Run)
# `--budget long` trains so many times longer; a D-AR prior of so few images overfits long before a tokenizer does
_LONGER = {"tokenizer": 4, "model": {"next-scale": 4, "dar": 3}}
_AVATARS, _SAMPLES = 4_000, 240
_ROWS, _COLUMNS = 8, 8
"""Of samples.png: at most so many prompts or classes, and samples of each."""
_PREFIX_SHARES = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Tokens of the layout strip, as shares of all."""
_TIMINGS = 5


@dataclass(frozen=True, eq=False)
class Asked:
    """What the rows of the pictures are drawn from.

    Attributes:
        names: of the rows.
        call: arguments of a pipeline for one image of each row.
        real: for prompts, the drawings whose captions they are.
        in_words: what the rows are, for the report.
    """

    names: tuple[str, ...]
    call: Mapping[str, Any]
    real: tuple[Image.Image, ...]
    in_words: str

    def each(self, count: int) -> dict[str, Any]:
        """The same for `count` images of each row, one row after the other."""
        return {name: [one for one in values for _ in range(count)] for name, values in self.call.items()}


@alone_in("options.folder")
def run_demo(options: DemoOptions) -> Path:
    """Run every stage that is not finished yet and write `report.md`; returns the folder.

    Raises `UserError` for data or classes that do not exist, or where the folder holds something else.
    """
    folder, clock = options.folder, Clock(options.folder / "seconds.json")
    tokenizer, prior, size = _presets(options)
    logger.info("1/4 images: %s at %d px", options.data, size)
    train, held_out = clock.time(
        "images",
        lambda: tuple(
            open_source(
                options.data,
                image_size=size,
                split=split,
                classes=options.chosen_classes,
                max_images=_max_images(options),
            )
            for split in ("train", "val")
        ),
    )
    logger.info("    %d images to train on, %d held out: %s", len(train), len(held_out), ", ".join(train.class_names))

    is_dar, words = options.family == "dar", train.captions is not None
    what = "the steps of a diffusion" if is_dar else f"tokens of {len(tokenizer.model.scale_sizes or ())} scales"
    logger.info("2/4 tokenizer: pixels to %s", "a sequence of tokens that drive " + what if is_dar else what)
    clock.time("tokenizer", lambda: train_tokenizer(_stage(tokenizer, options, "tokenizer")))

    logger.info(
        "3/4 prior: %s, from %s",
        "a Llama that predicts the next token" if is_dar else "an SRDD transformer: each scale from the one before",
        "captions" if words else "classes",
    )
    if words and is_dar:
        prior = replace(prior, text=replace(prior.text, encoder="small"))
    elif words:
        prior = replace(prior, scale_loss="lognormal", text=replace(prior.text, encoder="small"))
    prior = replace(prior, tokenizer=str(folder / "tokenizer"))
    clock.time("prior", lambda: train_prior(_stage(prior, options, "model")))

    logger.info("4/4 samples, scores and report")
    pipeline = load_pipeline(str(folder / "model"), device="cpu")
    record = clock.time("scores", lambda: _evaluated(pipeline, options))
    asked = _asked(pipeline, held_out)
    draw_samples(pipeline, asked, options)
    share = draw_growth(pipeline, asked, options)
    if isinstance(pipeline, DARPipeline):
        draw_layouts(pipeline, asked, held_out, options)
    shown = sorted((folder / "tokenizer" / "previews").glob("reconstructions-*.png"))[-1]
    shutil.copyfile(shown, folder / "reconstructions.png")
    draw_curves(folder, None if isinstance(pipeline, DARPipeline) else pipeline.schedule.sizes)
    write_whole(folder / "report.md", _report(options, pipeline, train, asked, record, clock.seconds, share))
    logger.info("done in %.0f s: see %s", sum(clock.seconds.values()), folder / "report.md")
    return folder


def _is_avatars(options: DemoOptions) -> bool:
    return options.data.partition(":")[0] == "avatars"


def _max_images(options: DemoOptions) -> int | None:
    return _AVATARS if _is_avatars(options) else None


def _presets(options: DemoOptions) -> tuple[Any, Any, int]:
    """The runs of tokenizer and prior that fit the data, and the side of images in pixels."""
    if options.family == "dar":
        return diffusion_tokenizer_preset("dar-small-32"), next_token_prior_preset("dar-prior-small"), 32
    if _is_avatars(options):
        return tokenizer_preset("fast-48"), prior_preset("srdd-fast"), 48
    return tokenizer_preset("small-32"), prior_preset("srdd-small"), 32


def _stage(run: StageRun, options: DemoOptions, folder: str) -> StageRun:
    """A stage of the demo: a run on its data, longer with `--budget long`."""
    longer: Any = _LONGER[folder]
    factor = longer[options.family] if isinstance(longer, dict) else longer
    return replace(
        run,
        num_steps=run.num_steps * (factor if options.budget == "long" else 1),
        data=options.data,
        classes=options.chosen_classes,
        max_images=_max_images(options),
        seed=options.seed,
        mixed_precision=options.mixed_precision,
        out=options.folder / folder,
    )


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


def _evaluated(pipeline: AnyPipeline, options: DemoOptions) -> EvaluationRecord:
    """The record of `isthmus evaluate`, of this model."""
    out = options.folder / "scores"
    if (out / RECORD).is_file() and read_record(out).subject.fingerprint != pipeline.fingerprint:
        # they are of a model that was trained before
        shutil.rmtree(out)
    evaluate_model(
        str(options.folder / "model"),
        out,
        data=options.data,
        classes=options.chosen_classes or (),
        max_images=_max_images(options),
        num=_SAMPLES,
        seed=options.seed,
        options={},
        steering={},
        balance="data",
        device="cpu",
    )
    return read_record(out)


def _asked(pipeline: AnyPipeline, held_out: ImageSource) -> Asked:
    """Captions of held-out images, every class in turn, and of avatars with pairs that training has not seen."""
    if not pipeline.reads_text:
        ids = list(range(min(pipeline.num_classes, _ROWS)))
        return Asked(tuple(map(pipeline.label_name, ids)), {"class_labels": ids}, (), "classes")
    chosen = _one_of_each_class(held_out.labels, len(held_out), _ROWS)
    assert held_out.captions is not None, "a model of prompts was trained on captions"
    captions, images, told = (
        [held_out.captions[i] for i in chosen],
        [held_out.load(i) for i in chosen],
        "held-out images",
    )
    if isinstance(held_out, Avatars):
        new = held_out_combinations(held_out.class_names, held_out.num_classes, image_size=pipeline.image_size)
        kept = max(1, _ROWS - len(new))
        captions = [*captions[:kept], *new.captions]
        images = [*images[:kept], *(new.source.load(int(row)) for row in new.rows)]
        told = (
            f"held-out images; the last {len(new)} ask for a pair of attributes that no training image shows together"
        )
    names = tuple(str(i + 1) for i in range(len(captions)))
    return Asked(names, {"prompt": captions}, tuple(map(Image.fromarray, images)), f"captions of {told}")


def _one_of_each_class(labels: Any, total: int, count: int) -> list[int]:
    """Numbers of images, every class in turn."""
    classes = np.zeros(total, dtype=int) if labels is None else np.asarray(labels)
    turns = [iter(np.flatnonzero(classes == label).tolist()) for label in np.unique(classes)]
    chosen: list[int] = []
    while len(chosen) < min(count, total):
        chosen += [i for i in (next(turn, None) for turn in turns) if i is not None]
    return chosen[:count]


def draw_samples(pipeline: AnyPipeline, asked: Asked, options: DemoOptions) -> None:
    """samples.png: rows of what is asked; of prompts, the drawing whose caption it is comes last."""
    drawn = pipeline(**asked.each(_COLUMNS), seed=options.seed).images
    assert isinstance(drawn, list), "a call returns PIL images by default"
    rows = [drawn[i : i + _COLUMNS] for i in range(0, len(drawn), _COLUMNS)]
    names = [""] * _COLUMNS
    if asked.real:
        rows = [[*row, real] for row, real in zip(rows, asked.real, strict=True)]
        names += ["drawing"]
    picture = table(rows, row_names=asked.names, column_names=names if asked.real else ())
    save_picture(picture, options.folder / "samples.png")


def draw_growth(pipeline: AnyPipeline, asked: Asked, options: DemoOptions) -> float:
    """growth.png: the first sample of every row while it grows, and after which share of its time one is first seen."""
    index = [row * _COLUMNS for row in range(len(asked.names))]
    steps: list[Sequence[Image.Image]] = []
    for step in pipeline.stream(**asked.call, seed=options.seed, image_index=index):
        assert isinstance(step.preview, list), "stream yields PIL images by default"
        steps.append(step.preview)
    columns = (
        [name.split()[0] for name in pipeline.step_names(pipeline.scheduler.config["num_inference_steps"])]
        if isinstance(pipeline, DARPipeline)
        else [f"{size} x {size}" for size in pipeline.schedule.sizes]
    )
    picture = table(list(zip(*steps, strict=True)), row_names=asked.names, column_names=columns)
    save_picture(picture, options.folder / "growth.png")
    one: dict[str, Any] = {name: values[:1] for name, values in asked.call.items()}
    shares: list[float] = []
    for _ in range(_TIMINGS):
        start = time.perf_counter()
        times = [time.perf_counter() - start for _ in pipeline.stream(**one, seed=options.seed)]
        shares.append(times[0] / times[-1])
    return float(np.median(shares))


def draw_layouts(pipeline: DARPipeline, asked: Asked, held_out: ImageSource, options: DemoOptions) -> None:
    """layout.png: columns = how many first tokens of a held-out image are kept; the image itself comes last."""
    reference, total = Image.fromarray(held_out.load(0)), pipeline.token_layout.num_tokens
    lengths = sorted({round(share * total) for share in _PREFIX_SHARES})
    rows = []
    for row in range(len(asked.names)):
        call: dict[str, Any] = {name: [values[row]] * len(lengths) for name, values in asked.call.items()}
        index = [row * _COLUMNS] * len(lengths)
        output = pipeline(**call, prefix_image=reference, prefix_tokens=lengths, seed=options.seed, image_index=index)
        assert isinstance(output.images, list), "a call returns PIL images by default"
        rows.append([*output.images, reference])
    columns = [*(str(length) for length in lengths), "image"]
    save_picture(table(rows, row_names=asked.names, column_names=columns), options.folder / "layout.png")


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


def _report(
    options: DemoOptions,
    pipeline: AnyPipeline,
    train: ImageSource,
    asked: Asked,
    record: EvaluationRecord,
    seconds: Mapping[str, float],
    first_preview: float,
) -> str:
    folder, (tokenizer_log, prior_log) = options.folder, logs_of(options.folder)
    by_words = "prompt" in asked.call
    if isinstance(pipeline, DARPipeline):
        layout, steps = pipeline.token_layout, pipeline.scheduler.config["num_inference_steps"]
        title, columns = "Isthmus demo: D-AR", "the number of tokens that existed"
        model = (
            f"A Llama whose {layout.num_tokens} tokens of {layout.codebook_size} codes drive the {steps} steps of a "
            "pixel diffusion, trained"
        )
    else:
        title, model, columns = "Isthmus demo", "An SRDD model trained", "the scale that was drawn last"
    legend = "".join(f"{i}. {text}\n" for i, text in enumerate(asked.call.get("prompt", ()), start=1))
    legend += "\n" if legend else ""
    parts = {"image_tokenizer": "tokenizer", "decoder": "pixel decoder", "transformer": "prior"}
    numbers = {
        **{
            f"{words}, parameters": f"{sum(weight.numel() for weight in getattr(pipeline, part).parameters()):,}"
            for part, words in parts.items()
            if hasattr(pipeline, part)
        },
        "PSNR of held-out images from their own codes": f"{last(tokenizer_log, 'val/psnr'):.2f} dB",
        "codes that held-out images use": f"{last(tokenizer_log, 'val/usage'):.0%} of {pipeline.codebook_size}",
        "bits per token of held-out images": f"{last(prior_log, 'val/bits_per_token'):.3f}",
        "first preview of a single image": f"after {first_preview:.0%} of its time",
    }
    if isinstance(pipeline, DARPipeline):
        numbers["PSNR from another image's codes"] = f"{last(tokenizer_log, 'val/psnr_shuffled'):.2f} dB"
    kept = (
        "![layout](layout.png)\n\nLayout: the first tokens of one held-out image (last column) are kept, as many as "
        "the column says; the others are drawn for the row.\n\n"
    )
    phases = [(phase, f"{value:.0f}") for phase, value in (*seconds.items(), ("all", sum(seconds.values())))]
    try_it = f"--prompt '{asked.call['prompt'][0]}'" if by_words else f"--classes {train.class_names[0]}"
    data = options.data if options.chosen_classes is None else f"{options.data} ({', '.join(options.chosen_classes)})"
    worst = f"![attributes](scores/{ATTRIBUTES})\n\n" if record.readings else ""
    return f"""# {title}

{model} from nothing on {len(train):,} drawings of `{data}`, {pipeline.image_size} px, seed {options.seed}, budget
{options.budget}. Rows are {asked.in_words}.

![samples](samples.png)

{legend}The first of each row while it grows, by {columns}:

![growth](growth.png)

Held-out images, rebuilt from their tokens; the image itself is last:

![reconstructions](reconstructions.png)

{kept if isinstance(pipeline, DARPipeline) else ""}![curves](curves.png)

## Numbers

{markdown_table(("", ""), list(numbers.items()))}

## Scores

{markdown_table(("score", "value", "floor", "ceiling"), [_cells(one) for one in (*record.scores, *record.held_out)])}

Of {record.protocol.num_samples} samples, seed {options.seed}, {pipeline.defaults.words()}; features:
{record.protocol.features}.
Floor and ceiling are the same scores of real images and of blurred ones (of attributes: of the real drawings of the
same captions, and of those of other captions; `reconstructions`: what the tokenizer lets through of the former). More
of them: [scores/report.md](scores/report.md).

{worst}{markdown_table(("phase", "seconds"), phases)}

Isthmus {isthmus.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads. Products of the trainings:
{_precisions(folder)}.

## Next

```
isthmus sample {folder}/model {try_it} --num 16 --seed 1 --out samples --grid --strip
isthmus info {folder}/model
isthmus train prior --from {folder}/model --data folder:PATH_TO_YOUR_IMAGES --out mine
isthmus demo --family {"next-scale" if options.family == "dar" else "dar"}
```

{train.attribution}
"""


def _cells(score: Score) -> tuple[str, ...]:
    between = "" if score.low is None or score.high is None else f" [{number(score.low)}, {number(score.high)}]"
    return (score.name, number(score.value) + between, number(score.floor), number(score.ceiling))


def _precisions(folder: Path) -> str:
    """Type of the products of both trainings, and why, from what their runs recorded."""
    records = {
        name: json.loads((folder / name / "run.json").read_text(encoding="utf-8")) for name in ("tokenizer", "model")
    }
    return ", ".join(f"{name} {record['precision']['why']}" for name, record in records.items())
