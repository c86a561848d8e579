"""What a distillation would be: its settings, teacher and student side by side, its cost. No weight is allocated."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from isthmus.cli.cost import Cost, image_size_of, report, saved_settings, training_cost, training_source, work
from isthmus.distilling import baseline_run, stage_runs
from isthmus.functional.next_scale_cost import sampling_flops
from isthmus.functional.scale_distillation import shared_steps
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.models.saved_model import without_values
from isthmus.pipelines.folder import read_index
from isthmus.pipelines.hub import model_folder
from isthmus.pipelines.labels import names_in_order
from isthmus.training.distill_config import DistillRun
from isthmus.training.scale_distillation import check_classes, student_shape

_SIZES = ("width", "num_layers", "mlp_ratio", "codebook_size", "codebook_dim", "shared_adaln")


def describe_distill_run(run: DistillRun) -> str:
    """The run as JSON, then teacher and student, who is asked what in every training, cost and memory."""
    stages = stage_runs(run)
    tokenizer, teacher = (saved_settings(run.from_model, name) for name in ("image_tokenizer", "transformer"))
    sizes, mask = student_shape(run, tuple(teacher["scale_sizes"]), teacher["scale_attention"])
    source = training_source(run, image_size_of(tokenizer))
    names = read_index(model_folder(run.from_model))["class_names"]
    check_classes(source.class_names, names_in_order(names), teacher["num_classes"])

    student = teacher | {"scale_sizes": sizes, "scale_attention": mask}
    students = [student | {"scale_sizes": stage.scale_sizes or sizes} for stage in stages]
    costs = [_cost(one) for one in students]
    network = (
        f"{_described(student)} per image; teacher {_described(teacher)}; {len(source)} images, "
        f"{len(source.class_names) or 'no'} classes"
    )
    # the memory is that of the first stage, which has the most scales
    largest = replace(costs[-1], activation_bytes=max(cost.activation_bytes for cost in costs))
    return report(run, network, largest, trainings=_trainings(run, [teacher, *students], costs))


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


def _cost(settings: Mapping[str, Any]) -> Cost:
    """What an image costs in training a student with these settings."""
    with without_values():
        model = NextScaleTransformer(**settings)
        labels = torch.zeros(1, dtype=torch.long)
        inputs = torch.zeros(1, model.schedule.num_tokens - model.schedule.lengths[0], settings["codebook_dim"])
        return training_cost(model, lambda: model(labels, inputs))


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
