"""What a training costs: operations, memory, and how that is reported before anything is trained."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource, WantedColumns
from isthmus.training.config import Run, run_to_json

# the meta device knows no autocast, which networks turn off around what must stay fp32; fake CPU tensors do


Network = TypeVar("Network", bound=nn.Module)

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


def training_cost(network: Network, forward: Callable[[Network], Any]) -> Cost:
    """Count what `forward` (of one image) does and keeps; the backward pass counts twice.

    Args:
        network: made `without_values`; no weight is allocated.
        forward: calls the network on an image that it makes itself.
    """
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor.untyped_storage())] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        own = {id(p) for p in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, note), FlopCounterMode(display=False) as counter:
            forward(network)
    return Cost(
        num_parameters=num_parameters(network),
        flops=3 * counter.get_total_flops(),
        activation_bytes=sum(tensor.numel() * tensor.element_size() for tensor in kept.values()),
    )


def num_parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())


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

    `trainings`: for a run of several trainings, one row each (name, text); None is a single training.
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
