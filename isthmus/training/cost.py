"""What a training costs: operations, memory, and how that is reported before anything is trained."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from isthmus.training.config import Run, run_to_json

Network = TypeVar("Network", bound=nn.Module)

# bytes per parameter in fp32: weight, gradient, two moments of AdamW, average
_BYTES_PER_PARAMETER = 5 * 4


@dataclass
class Cost:
    """What one image costs in training."""

    num_parameters: int
    flops: int
    """Forward and backward pass, multiply and add counted apart."""
    activation_bytes: int
    """Kept for the backward pass, in fp32."""


def training_cost(network: Network, forward: Callable[[Network], Any]) -> Cost:
    """Count what `forward`, which calls the network on an image that it makes itself, does and keeps.

    The backward pass counts twice. The network is made `without_values`, and no weight is allocated.
    """
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor.untyped_storage())] = tensor
        return tensor

    # the meta device knows no autocast, which networks turn off around what must stay fp32; fake CPU tensors do
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = network.to_empty(device="cpu")
        own = {id(p) for p in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, note), FlopCounterMode(display=False) as counter:
            forward(network)
    activation_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    return Cost(num_parameters(network), 3 * counter.get_total_flops(), activation_bytes)


def num_parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())


def work(cost: Cost, num_steps: int, batch_size: int) -> str:
    """What a training of so many steps costs, in words."""
    images = num_steps * batch_size
    return f"{num_steps} steps of {batch_size} images, {images:,} images, {cost.flops * images / 1e15:.3f} PFLOP"


def report(run: Run, network: str, cost: Cost, *, trainings: Mapping[str, str] | None = None) -> str:
    """The run as JSON, then its network, size, cost and memory; `trainings` has a row for each of several."""
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
