"""What a distillation would be: its settings, teacher and student side by side, its cost. No weight is allocated."""

import torch

from isthmus.cli.cost import report, saved_settings, training_cost
from isthmus.data.opening import open_source
from isthmus.distilling import stage_runs
from isthmus.functional.next_scale_cost import sampling_flops
from isthmus.functional.scale_distillation import shared_steps
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pipelines.folder import read_index
from isthmus.pipelines.hub import model_folder
from isthmus.training.distill_config import DistillRun
from isthmus.training.scale_distillation import check_classes, student_shape

_SIZES = ("width", "num_layers", "mlp_ratio", "codebook_size", "codebook_dim", "shared_adaln")


def describe_distill_run(run: DistillRun) -> str:
    """The run as JSON, then size, cost and memory."""
    stages = stage_runs(run)
    tokenizer, teacher = (saved_settings(run.from_model, name) for name in ("image_tokenizer", "transformer"))
    sizes, mask = student_shape(run, tuple(teacher["scale_sizes"]), teacher["scale_attention"])
    image_size = tokenizer["scale_sizes"][-1] * 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    source = open_source(run.data, image_size=image_size, split="train", classes=run.classes, strict=run.strict)
    names = read_index(model_folder(run.from_model))["class_names"]
    check_classes(source.class_names, [names[str(i)] for i in range(len(names))], teacher["num_classes"])
    with torch.device("meta"):
        model = NextScaleTransformer(**(teacher | {"scale_sizes": sizes, "scale_attention": mask}))
        labels = torch.zeros(1, dtype=torch.long)
        inputs = torch.zeros(1, model.schedule.num_tokens - model.schedule.lengths[0], teacher["codebook_dim"])
        cost = training_cost(model, lambda: model(labels, inputs))
    before, after = (
        f"{kind}, scales {', '.join(map(str, s))}, {sum(n * n for n in s)} tokens, {len(s)} forwards, "
        f"{sampling_flops(s, markov=kind == 'markov', **{name: teacher[name] for name in _SIZES}) / 1e9:.4g} GFLOP"
        for s, kind in ((teacher["scale_sizes"], teacher["scale_attention"]), (sizes, mask))
    )
    markov = teacher["scale_attention"] == "markov"
    asked = len(shared_steps(teacher["scale_sizes"], sizes, markov=markov))
    network = (
        f"{after} per image; teacher {before}; {len(stages)} stage{'s' if len(stages) > 1 else ''}; teacher asked at "
        f"{asked} of {len(sizes)} scales, rollouts at the others (its forwards are not in the cost below); "
        f"{len(source)} images, {len(source.class_names) or 'no'} classes"
    )
    return report(run, network, cost)
