"""The averaged weights that are saved and sampled."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from isthmus.errors import UserError


class ExponentialMovingAverage:
    """Averages of a model's parameters, one tensor per parameter and made from it, so that shards stay shards.

    The decay of update n is min(decay, (1 + n) / (10 + n)): the first steps average over a few only.

    Args:
        model: the bare model after `accelerator.prepare`, which trains (and may have sharded) its parameters in place.
        decay: share of the old average that an update keeps, in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
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
        """Take over what `state_dict` returned.

        Raises:
            UserError: the names of the parameters differ.
        """
        names = set(state) - {"num_updates"}
        if names != set(self.averages):
            differing = sorted(names ^ set(self.averages))
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
