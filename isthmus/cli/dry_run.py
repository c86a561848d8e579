"""What a run would be: its settings, its network, its cost. Networks are built without memory (meta device)."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.data.opening import open_source
from isthmus.errors import UserError
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pipelines.folder import read_config
from isthmus.pipelines.hub import model_folder
from isthmus.training.config import PriorRun, Run, TokenizerRun, run_to_json

# bytes per parameter in fp32: weight, gradient, two moments of AdamW, average
_BYTES_PER_PARAMETER = 5 * 4


@dataclass
class Cost:
    """What one image costs in training.

    Attributes:
        num_parameters: of the network.
        flops: forward and backward pass of one image, multiply and add counted apart.
        activation_bytes: kept for the backward pass, per image, in fp32.
    """

    num_parameters: int
    flops: int
    activation_bytes: int


def training_cost(model: nn.Module, forward: Callable[[], Any]) -> Cost:
    """Count what `forward` (one image, on the meta device) does and keeps; the backward pass counts twice."""
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice
    own = {id(p) for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor.untyped_storage())] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, note), FlopCounterMode(display=False) as counter:
        forward()
    return Cost(
        num_parameters=sum(p.numel() for p in model.parameters()),
        flops=3 * counter.get_total_flops(),
        activation_bytes=sum(tensor.numel() * tensor.element_size() for tensor in kept.values()),
    )


def describe_tokenizer_run(run: TokenizerRun) -> str:
    """The run as JSON, then size, cost and memory."""
    arguments = {name: value for name, value in asdict(run.model).items() if value is not None}
    if run.from_model:
        arguments = saved_settings(run.from_model, "image_tokenizer")
    with torch.device("meta"):
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
    image_size = tokenizer["scale_sizes"][-1] * 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    source = open_source(run.data, image_size=image_size, split="train", classes=run.classes, strict=run.strict)
    if run.from_model:
        arguments = saved_settings(run.from_model, "transformer")
    else:
        shared = {name: tokenizer[name] for name in ("scale_sizes", "codebook_size", "codebook_dim")}
        arguments = shared | {name: value for name, value in asdict(run.model).items() if value is not None}
    arguments["num_classes"] = len(source.class_names)
    with torch.device("meta"):
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


def saved_settings(model: str, component: str) -> dict[str, Any]:
    """Constructor arguments of a saved component, or of a folder that is itself that component."""
    folder: Path = model_folder(model)
    config = read_config(folder / component if (folder / component).is_dir() else folder)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def report(run: Run, network: str, cost: Cost) -> str:
    """The run as JSON, then its network, size, cost and memory."""
    part = run.batch_size // run.accumulate
    memory = cost.num_parameters * _BYTES_PER_PARAMETER + part * cost.activation_bytes
    rows = {
        "network": network,
        "parameters": f"{cost.num_parameters / 1e6:.2f}M",
        "cost": f"{cost.flops / 1e9:.2f} GFLOP per image (forward and backward of the network)",
        "run": f"{run.num_steps} steps of {run.batch_size} images, {run.num_steps * run.batch_size:,} images, "
        f"{cost.flops * run.num_steps * run.batch_size / 1e15:.3f} PFLOP",
        "memory": f"about {memory / 2**30:.2f} GiB in float32 at {part} images at once (weights, gradients, optimizer, "
        "average, activations)",
    }
    width = max(map(len, rows)) + 2
    listing = "\n".join(f"{name:<{width}}{text}" for name, text in rows.items())
    return f"{json.dumps(run_to_json(run), indent=2)}\n\n{listing}\n\nNothing was trained (--dry-run)."
