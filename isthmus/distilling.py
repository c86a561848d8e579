"""`isthmus distill`: a student on fewer scales, trained whole or scale by scale, and how to measure what it costs."""

import logging
import shlex
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from isthmus.errors import UserError
from isthmus.files import alone_in
from isthmus.functional.scale_distillation import guidance_at, removal_stages
from isthmus.generation.options import guidance_text, parse_guidance
from isthmus.models.component_files import read_config
from isthmus.pipelines.hub import model_folder
from isthmus.training.distill_config import DistillRun
from isthmus.training.run import check_folder
from isthmus.training.scale_distillation import stage_folder, student_shape
from isthmus.training.train_prior import train_prior

logger = logging.getLogger("isthmus")

BASELINE, SCORES = "without_teacher", "scores"


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
