"""What a shorter schedule saves and what it costs: distillation.md and distillation.json in the folder of the run."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from isthmus.data.source import ImageSource
from isthmus.distillation_figures import ROUNDS, TIMED_IMAGES, ImageJudge, ModelFigures, measured_times, model_figures
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.training.distill_config import DistillRun
from isthmus.training.images import open_splits
from isthmus.training.run import write_atomically

logger = logging.getLogger("isthmus")

REPORT = "distillation"
_BASELINE = "student without teacher"
_NOT_MEASURED = "-"
_FORMULA = (
    "2 (L (n (4 + 2 r) w^2 + d w + w V) + 2 n w P + (6 m + 2) w^2): L tokens, n layers, width w, r feed-forward ratio, "
    "d code width, V codes, P visible pairs, m modulations"
)


def write_report(run: DistillRun, *, without_teacher: Path | None = None) -> Path:
    """Measure teacher, student and (where there is one) the student without a teacher; a finished report stays.

    Returns the path of distillation.md.
    """
    folders = {"teacher": run.from_model, "student": str(run.out)}
    if without_teacher is not None:
        folders[_BASELINE] = str(without_teacher)
    models = {name: _loaded(folder) for name, folder in folders.items()}
    record, page = run.out / f"{REPORT}.json", run.out / f"{REPORT}.md"
    prints = {name: model.fingerprint for name, model in models.items()}
    if record.is_file() and page.is_file() and _measured(record) == (prints, run.report_images):
        return page
    times = measured_times(models, seed=run.seed)
    train, held_out = open_splits(run, models["student"].image_size)
    judge, ceiling = None, None
    # a stream has no end to spread a sample over
    reference, real = ("training", train) if isinstance(train, ImageSource) else ("held-out", held_out)
    if run.report_images:
        judge = ImageJudge(real, models["student"].image_size)
        # one class, or none, is every image's: there is nothing to be consistent with
        ceiling = judge.accuracy_of(held_out) if models["student"].num_classes > 1 else None
    figures = {
        name: model_figures(
            model, prints[name], times[name], held_out, judge, num_images=run.report_images, seed=run.seed
        )
        for name, model in models.items()
    }
    values = {
        "report_images": run.report_images,
        "seed": run.seed,
        "gflop_formula": _FORMULA,
        "held_out_class_consistency": ceiling,
        "reference": reference,
        "models": {name: asdict(one) for name, one in figures.items()},
    }
    write_atomically(record, json.dumps(values, indent=2) + "\n")
    write_atomically(page, report_page(run, figures, ceiling, reference))
    logger.info("report: %s", page)
    return page


def report_page(
    run: DistillRun, figures: Mapping[str, ModelFigures], ceiling: float | None, reference: str = "training"
) -> str:
    """The page: what is saved, what it costs, and how both were measured.

    Args:
        run: the distillation.
        figures: by the name of the model; rows that no model has are left out.
        ceiling: class consistency of held-out images; None where it was not measured.
        reference: which images are the real ones.
    """
    rows = {
        "scales": [",".join(map(str, one.scale_sizes)) for one in figures.values()],
        "mask": [one.scale_attention for one in figures.values()],
        "tokens per image": [str(one.tokens) for one in figures.values()],
        "forwards per image": [str(one.forwards) for one in figures.values()],
        "GFLOP per image": [f"{one.gflop:.4g}" for one in figures.values()],
        "keys and values per row": [f"{one.cache_values:,}" for one in figures.values()],
        "wall time per image, ms": [f"{one.wall_ms:.2f}" for one in figures.values()],
        "CPU time per image, ms": [f"{one.cpu_ms:.2f}" for one in figures.values()],
        "held-out bits per token": [f"{one.bits_per_token:.3f}" for one in figures.values()],
        "held-out bits per image": [f"{one.bits_per_image:.1f}" for one in figures.values()],
        "FD-lite0": [_or_dash(one.frechet, ".4f") for one in figures.values()],
        "class consistency": [_or_dash(one.class_consistency, ".1%") for one in figures.values()],
    }
    measured = {name: cells for name, cells in rows.items() if set(cells) != {_NOT_MEASURED}}
    table = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in measured.items())
    teacher, student = figures["teacher"], figures["student"]
    saved = {
        what: f"{1 - getattr(student, name) / getattr(teacher, name):.1%}"
        for what, name in {
            "tokens": "tokens",
            "forwards": "forwards",
            "arithmetic": "gflop",
            "wall": "wall_ms",
            "CPU": "cpu_ms",
        }.items()
    }
    return f"""# Distillation of {run.from_model}

| | {" | ".join(figures)} |
|---|{"---|" * len(figures)}
{table}

Saved by the student: {saved["tokens"]} of the tokens, {saved["forwards"]} of the forwards, {saved["arithmetic"]} of
the arithmetic, {saved["wall"]} of the wall time, {saved["CPU"]} of the CPU time.

{_about_the_baseline(run, figures)}

GFLOP per image, every scale predicted once, without guidance and pixels: {_FORMULA}.
Times: {TIMED_IMAGES} images at once, guided and filtered as saved with the model, pixels included; medians of {ROUNDS}
rounds in which the models take turns.
Bits: exact, unguided. Each model codes the tokens of its own schedule, so bits compare between models of one schedule
only: the student with the one that had no teacher, not with its teacher.
{_about_images(run, ceiling, reference)}
Trained for {run.num_steps} steps{" per stage" if run.progressive else ""} of {run.batch_size} images, distillation
weight {run.distillation_weight:g}; run.json has all settings, log.jsonl all measurements.
"""


def _about_the_baseline(run: DistillRun, figures: Mapping[str, ModelFigures]) -> str:
    """What the student compares with to tell whether the teacher helped."""
    if _BASELINE in figures:
        return (
            f"Whether the teacher helped is the difference between the columns student and {_BASELINE}: the same "
            "scales,\nweights at the start and number of steps, on the images' tokens alone."
        )
    if run.distillation_weight == 0:
        return f"The student was trained without the teacher (distillation weight 0): it is its own {_BASELINE}."
    return (
        f"The column {_BASELINE} is missing (--no-baseline), so nothing here tells whether the teacher helped. To fill "
        f"it in:\n`isthmus distill --config {run.out / 'run.json'} --baseline`"
    )


def _about_images(run: DistillRun, ceiling: float | None, reference: str) -> str:
    if not run.report_images:
        return "No image was drawn (report_images 0).\n"
    distance = f"""FD-lite0: Frechet distance of {run.report_images} drawn images (seed {run.seed}, the same labels and
seeds for every model, the model's own guidance and filters) to the {reference} images, 192-d features of
EfficientNet-Lite0 at native size. Its bias depends on the number of images: these numbers compare with each other and
with nothing else.
"""
    if ceiling is None:
        return distance
    # standard error of a share of n independent images at its worst, 0.5
    error = 0.5 / run.report_images**0.5
    return f"""{distance}Class consistency: share of them whose nearest class mean is their own class; {ceiling:.1%} of
held-out images reach it, and its standard error is at most {error:.1%}.
"""


def _or_dash(value: float | None, form: str) -> str:
    return _NOT_MEASURED if value is None else format(value, form)


def _loaded(folder: str) -> NextScalePipeline:
    pipeline = load_pipeline(folder)
    assert isinstance(pipeline, NextScalePipeline), "checked before training"
    return pipeline


def _measured(record: Path) -> tuple[dict[str, str], int] | None:
    """Fingerprints of the models in a report, and the number of images; None where it cannot be read."""
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        return {name: one["fingerprint"] for name, one in values["models"].items()}, int(values["report_images"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
