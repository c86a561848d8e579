"""AdamW with the published parameter groups, its rates as pure functions of the step, and averaged weights (EMA)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.training.config import OptimConfig

# no decay: tables of positions and scales, modulation offsets, attention temperatures (spec of VAR, 2.6)
_NO_DECAY = ("position", "scale_embedding", "modulation.offset", "log_scale", "codebook")


def learning_rate(step: int, config: OptimConfig, num_steps: int) -> float:
    """Learning rate of `step` (from 0) in a run of `num_steps`: warm-up, plateau, then down to `final_ratio`.

    A function of the step alone: accelerate advances a prepared scheduler once per process.

    >>> config = OptimConfig(learning_rate=1.0, warmup_steps=10, plateau=0.0, final_ratio=0.1)
    >>> learning_rate(10, config, 101), round(learning_rate(100, config, 101), 6)
    (1.0, 0.1)
    """
    progress = (step - config.warmup_steps) / max(num_steps - 1 - config.warmup_steps, 1)
    left, final = 1 - config.final_ratio, config.final_ratio
    if step < config.warmup_steps:
        ratio = config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    elif config.schedule == "constant":
        ratio = 1.0
    elif config.schedule == "cosine":
        ratio = final + left * (0.5 + 0.5 * math.cos(math.pi * progress))
    elif config.schedule == "two-slope" and progress < config.knee:
        ratio = 1 - 0.4 * left * progress / config.knee
    elif config.schedule == "two-slope":
        ratio = final + 0.6 * left * (1 - progress) / (1 - config.knee)
    else:
        after = max(progress - config.plateau, 0) / (1 - config.plateau)
        ratio = final**after if config.schedule == "exponential" else 1 - left * after
    return config.learning_rate * ratio


def weight_decay(step: int, config: OptimConfig, num_steps: int) -> float:
    """Weight decay of `step`: from `weight_decay` to `final_weight_decay` on a cosine."""
    if config.final_weight_decay is None:
        return config.weight_decay
    course = 0.5 + 0.5 * math.cos(math.pi * step / max(num_steps - 1, 1))
    return config.final_weight_decay + (config.weight_decay - config.final_weight_decay) * course


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices and convolutions yes; vectors, biases, tables of positions no."""
    # the start token has a sequence dimension of its own, so dimensions alone do not tell a table from a matrix
    return parameter.ndim > 1 and not name.endswith("bias") and not any(part in name for part in _NO_DECAY)


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, decayed and not decayed in two groups."""
    groups = [
        {"params": [p for name, p in trainable(model) if decays(name, p) == decayed], "decays": decayed}
        for decayed in (True, False)
    ]
    # fused: 3 to 5 times faster than the default on CPU, and one kernel on GPU
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=0.0,
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: OptimConfig, num_steps: int) -> float:
    """Set learning rate and weight decay of `step` on every group; returns the learning rate."""
    rate, decay = learning_rate(step, config, num_steps), weight_decay(step, config, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group["decays"] else 0.0
    return rate


class ExponentialMovingAverage:
    """Averages of a model's parameters, one tensor per parameter and made from it, so that shards stay shards.

    Update n keeps the share min(decay, (1 + n) / (10 + n)) of the old average: the first steps average over a few only.
    `model` is the bare one after `accelerator.prepare`, which trains (and may have sharded) its parameters in place.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self.averages = {name: p.detach().clone().float() for name, p in trainable(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the averages towards the model's parameters."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        pairs = [(self.averages[name], p.detach().float()) for name, p in trainable(model)]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)

    @torch.no_grad()
    def restart(self, name: str, parameter: Tensor, *, rows: Tensor | None = None) -> None:
        """Forget the past of one parameter, or of some of its rows, that was set by hand."""
        chosen = slice(None) if rows is None else rows
        self.averages[name][chosen] = parameter.detach().float()[chosen]

    def averages_under(self, prefix: str) -> dict[str, Tensor]:
        """Averages of the part of the model whose parameter names begin with `prefix`, named as in that part."""
        return {name.removeprefix(prefix): a for name, a in self.averages.items() if name.startswith(prefix)}

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name, and the number of updates."""
        return {**self.averages, "num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned. Raises UserError where the names of the parameters differ."""
        if differing := sorted((set(state) - {"num_updates"}) ^ set(self.averages)):
            raise UserError(
                f"averages and model must have the same parameters, {len(differing)} differ (first: {differing[:3]}). "
                "Continue with the network of the checkpoint."
            )
        for name, average in self.averages.items():
            average.copy_(state[name])
        self.num_updates = int(state["num_updates"])


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
