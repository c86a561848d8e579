"""What a training costs: operations, memory, and how that is reported before anything is trained."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource, WantedColumns
from isthmus.models.component_files import read_config
from isthmus.pipelines.hub import model_folder
from isthmus.training.config import Run, run_to_json

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


def saved_settings(model: str, component: str) -> dict[str, Any]:
    """Constructor arguments of a saved component, or of a folder that is itself that component."""
    folder: Path = model_folder(model)
    config = read_config(folder / component if (folder / component).is_dir() else folder)
    return {name: value for name, value in config.items() if not name.startswith("_")}


def image_size_of(tokenizer: Mapping[str, Any]) -> int:
    """Side of the images of a multi-scale tokenizer with these arguments, in pixels."""
    # folders saved before it existed know nothing of folded pixels
    stride = tokenizer.get("pixel_unshuffle", 1) * 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    return tokenizer["scale_sizes"][-1] * stride


def training_source(run: Run, image_size: int) -> ImageSource:
    """The training images of a run, opened and not read."""
    return open_source(
        run.data,
        image_size=image_size,
        split="train",
        classes=run.classes,
        strict=run.strict,
        columns=WantedColumns(run.image_column, run.label_column),
    )


def work(cost: Cost, num_steps: int, batch_size: int) -> str:
    """What a training of so many steps costs, in words."""
    images = num_steps * batch_size
    return f"{num_steps} steps of {batch_size} images, {images:,} images, {cost.flops * images / 1e15:.3f} PFLOP"


def report(run: Run, network: str, cost: Cost, *, trainings: Mapping[str, str] | None = None) -> str:
    """The run as JSON, then its network, size, cost and memory.

    `trainings` are the rows of a run that consists of several; None is a single one.
    """
    part = run.batch_size // run.accumulate
    memory = cost.num_parameters * _BYTES_PER_PARAMETER + part * cost.activation_bytes
    rows = {
        "network": network,
        "parameters": f"{cost.num_parameters / 1e6:.2f}M",
        "cost": f"{cost.flops / 1e9:.2f} GFLOP per image (forward and backward of the network)",
        **(trainings or {"run": work(cost, run.num_steps, run.batch_size)}),
        "memory": f"about {memory / 2**30:.2f} GiB in float32 at {part} images at once (weights, gradients, optimizer, "
        "average, activations)",
    }
    width = max(map(len, rows)) + 2
    listing = "\n".join(f"{name:<{width}}{text}" for name, text in rows.items())
    return f"{json.dumps(run_to_json(run), indent=2)}\n\n{listing}\n\nNothing was trained (--dry-run)."
