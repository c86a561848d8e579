"""What a run of the next-scale family would be: its settings, its network, its cost.

Networks are built without memory (meta device).
"""

from dataclasses import asdict

import torch

from isthmus.cli.cost import image_size_of, report, saved_settings, training_cost, training_source
from isthmus.errors import UserError
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.models.saved_model import without_values
from isthmus.training.config import PriorRun, TokenizerRun


def describe_tokenizer_run(run: TokenizerRun) -> str:
    """The run as JSON, then size, cost and memory."""
    arguments = {name: value for name, value in asdict(run.model).items() if value is not None}
    if run.from_model:
        arguments = saved_settings(run.from_model, "image_tokenizer")
    with without_values():
        model = MultiScaleVQVAE(**arguments)
        image = torch.zeros(1, 3, model.image_size, model.image_size)
        # without the search for codes, a few percent: it runs under autocast, which the meta device has not
        cost = training_cost(model, lambda: model(image, quantize=False))
    network = f"scales {', '.join(map(str, model.schedule.sizes))}; images of {model.image_size} px"
    return report(run, network, cost)


def describe_prior_run(run: PriorRun) -> str:
    """The run as JSON, then size, cost and memory."""
    if not (run.from_model or run.tokenizer):
        raise UserError(
            "a prior needs a tokenizer, got none. Pass --tokenizer FOLDER (of a tokenizer run) or --from MODEL."
        )
    tokenizer = saved_settings(run.from_model or run.tokenizer, "image_tokenizer")
    source = training_source(run, image_size_of(tokenizer))
    if run.from_model:
        arguments = saved_settings(run.from_model, "transformer")
    else:
        shared = {name: tokenizer[name] for name in ("scale_sizes", "codebook_size", "codebook_dim")}
        arguments = shared | {name: value for name, value in asdict(run.model).items() if value is not None}
    arguments["num_classes"] = len(source.class_names)
    with without_values():
        model = NextScaleTransformer(**arguments)
        schedule = model.schedule
        labels = torch.zeros(1, dtype=torch.long)
        inputs = torch.zeros(1, schedule.num_tokens - schedule.lengths[0], arguments["codebook_dim"])
        cost = training_cost(model, lambda: model(labels, inputs))
    sizes = ", ".join(map(str, schedule.sizes))
    network = (
        f"{model.config['scale_attention']}, scales {sizes}, {schedule.num_tokens} tokens; "
        f"{len(source)} images, {len(source.class_names) or 'no'} classes"
    )
    return report(run, network, cost)
