"""`isthmus distill`: a student on fewer scales, trained whole or scale by scale, and how to measure what it costs."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import PartialState

from isthmus.errors import UserError
from isthmus.files import alone_in
from isthmus.functional.next_scale_cost import sampling_flops
from isthmus.functional.scale_distillation import guidance_at, removal_stages, shared_steps
from isthmus.generation.options import guidance_text, parse_guidance
from isthmus.models.component_files import read_config
from isthmus.models.saved_model import without_values
from isthmus.pipelines.hub import model_folder
from isthmus.training.cost import Cost, report, training_source, work
from isthmus.training.distill_config import DistillRun
from isthmus.training.distilled_weights import student_of
from isthmus.training.export import load_teacher
from isthmus.training.next_scale_prior import prior_cost
from isthmus.training.run import check_folder
from isthmus.training.scale_distillation import check_classes, stage_folder, student_shape
from isthmus.training.train_prior import train_prior

logger = logging.getLogger("isthmus")

BASELINE, SCORES = "without_teacher", "scores"


_SIZES = ("width", "num_layers", "mlp_ratio", "codebook_size", "codebook_dim", "shared_adaln")


@alone_in("run.out")
def distill(run: DistillRun) -> Path:
    """Train the student, continuing where an earlier call stopped; returns its pipeline folder.

    With `progressive` the students on the way lie in `out`/stages, with `baseline` the one without a teacher in
    `out`/without_teacher. At the end the log has the commands that measure them beside each other.

    Raises:
        UserError: teacher, schedule, images and folder do not fit each other (before anything is trained).
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    stages = stage_runs(run)
    check_folder(run)
    for number, stage in enumerate(stages, 1):
        if len(stages) > 1:
            logger.info("stage %d/%d: scales %s", number, len(stages), ", ".join(map(str, stage.scale_sizes or ())))
        train_prior(stage)
    without_teacher = baseline_run(run, len(stages))
    if without_teacher is not None:
        logger.info("the same student without the teacher")
        train_prior(without_teacher)
    if PartialState().is_main_process:
        commands = measuring_commands(run, with_baseline=without_teacher is not None)
        logger.info("to measure teacher and student:\n%s", "\n".join(f"  {command}" for command in commands))
    return run.out


def measuring_commands(run: DistillRun, *, with_baseline: bool) -> list[str]:
    """The commands that evaluate the models of a finished distillation, and then the one that compares them."""
    models = {"teacher": run.from_model, "student": str(run.out)}
    if with_baseline:
        models[BASELINE] = str(run.out / BASELINE)
    data = ["--data", run.data]
    if run.classes:
        # on the command line a comma would part a name in two
        data += ["--classes", *(name.replace(",", "\\,") for name in run.classes)]
    for option, column in (("--image-column", run.image_column), ("--label-column", run.label_column)):
        data += [] if column is None else [option, column]
    scores = {name: str(run.out / SCORES / name) for name in models}
    commands = [["evaluate", model, *data, "--out", scores[name]] for name, model in models.items()]
    return [shlex.join(["isthmus", *command]) for command in (*commands, ["compare", *scores.values()])]


def stage_runs(run: DistillRun) -> list[DistillRun]:
    """The runs of a distillation in order; the last is `run` itself.

    Raises:
        UserError: there is no teacher, or its scales do not allow this student, or this guidance.
    """
    if not run.from_model:
        raise UserError("a distillation needs a teacher, got none. Name it: isthmus distill MODEL --scale-sizes ...")
    saved = read_config(model_folder(run.from_model) / "transformer")
    if "scale_sizes" not in saved:
        raise UserError(
            f"only next-scale models (VAR, SRDD) have scales to leave out, {run.from_model} is of another family."
        )
    teacher_sizes = tuple(saved["scale_sizes"])
    sizes, _ = student_shape(run, teacher_sizes, saved["scale_attention"])
    stages = removal_stages(teacher_sizes, sizes)
    guidance = parse_guidance(run.sampling.guidance)
    guidance_at(guidance, teacher_sizes, sizes)  # for what it refuses: this costs nothing yet
    if not run.progressive:
        return [run]
    runs, teacher, taught = [], run.from_model, teacher_sizes
    for stage in stages[:-1]:
        folder = stage_folder(run, stage)
        # a list of guidance values counts on the scales of the teacher that a run names
        text = guidance_text(guidance_at(guidance, teacher_sizes, taught))
        runs.append(
            replace(
                run, out=folder, scale_sizes=stage, from_model=teacher, progressive=False, baseline=False,
                sampling=replace(run.sampling, guidance=text),
            )
        )  # fmt: skip
        teacher, taught = str(folder), stage
    return [*runs, run]


def baseline_run(run: DistillRun, num_stages: int) -> DistillRun | None:
    """The same student from the same weights, as many steps, on data tokens alone; None where it is left out.

    Without a teacher, and with all scales removed at once, it would be the student itself.
    """
    if not run.baseline or (run.distillation_weight == 0 and num_stages == 1):
        return None
    return replace(
        run,
        out=run.out / BASELINE,
        num_steps=run.num_steps * num_stages,
        distillation_weight=0.0,
        progressive=False,
        baseline=False,
    )


def describe_distill_run(run: DistillRun) -> str:
    """What the run would be: its settings as JSON, then teacher and student, who is asked what in every training, cost
    and memory. No weight is allocated.
    """
    stages = stage_runs(run)
    with without_values():
        saved = load_teacher(run.from_model)
    source = training_source(run, saved.tokenizer.image_size)
    check_classes(source.class_names, saved.class_names, saved.transformer.null_class_id)

    sizes, mask = student_shape(run, saved.transformer.schedule.sizes, saved.transformer.config["scale_attention"])
    models = [saved.transformer]
    with without_values():
        for stage in stages:
            models.append(student_of(models[-1], stage.scale_sizes or sizes, mask))
    costs = [prior_cost(student) for student in models[1:]]
    configs = [model.config for model in models]
    network = (
        f"{_described(configs[-1])} per image; teacher {_described(configs[0])}; {len(source)} images, "
        f"{len(source.class_names) or 'no'} classes"
    )
    # the memory is that of the first stage, which has the most scales
    largest = replace(costs[-1], activation_bytes=max(cost.activation_bytes for cost in costs))
    return report(run, network, largest, trainings=_trainings(run, configs, costs))


def _trainings(run: DistillRun, models: Sequence[Mapping[str, Any]], costs: Sequence[Cost]) -> dict[str, str]:
    """One row for every training in order; each of `models` teaches the next one."""
    rows = {}
    for number, ((teacher, student), cost) in enumerate(zip(pairwise(models), costs, strict=True), 1):
        name = "run" if len(costs) == 1 else f"stage {number}/{len(costs)}"
        scales = "" if len(costs) == 1 else f"scales {_listed(student['scale_sizes'])}; "
        asked = teaching(teacher, student, weight=run.distillation_weight)
        rows[name] = f"{work(cost, run.num_steps, run.batch_size)}; {scales}{asked}"
    without_teacher = baseline_run(run, len(costs))
    if without_teacher is not None:
        own = work(costs[-1], without_teacher.num_steps, run.batch_size)
        rows["baseline"] = f"{own}; the same student without the teacher (--no-baseline leaves it out)"
    return rows


def teaching(teacher: Mapping[str, Any], student: Mapping[str, Any], *, weight: float) -> str:
    """What a student learns from its teacher, in words.

    Args:
        teacher: settings of its transformer.
        student: settings of the student's.
        weight: distillation weight.
    """
    if weight == 0:
        return "no teacher is asked (distillation weight 0)"
    sizes = student["scale_sizes"]
    asked = len(shared_steps(teacher["scale_sizes"], sizes, markov=teacher["scale_attention"] == "markov"))
    where = f"at {asked} of {len(sizes)} scales, rollouts at the others" if asked < len(sizes) else "at all scales"
    return f"teacher asked {where} (its forwards are not counted)"


def _described(settings: Mapping[str, Any]) -> str:
    """A model in words: mask, scales, and what a draw costs."""
    sizes, mask = settings["scale_sizes"], settings["scale_attention"]
    flops = sampling_flops(sizes, markov=mask == "markov", **{name: settings[name] for name in _SIZES})
    return (
        f"{mask}, scales {_listed(sizes)}, {sum(n * n for n in sizes)} tokens, {len(sizes)} forwards, "
        f"{flops / 1e9:.4g} GFLOP"
    )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
