"""How linear layers start."""

from torch import nn


def init_linear_layers(module: nn.Module, fan_in_init: bool) -> None:
    """Weights of all linear layers inside from a truncated normal, biases zero.

    The standard deviation is 0.02, which suits widths near 768, or 1 / sqrt(inputs), which keeps the size of signals
    at any width.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            std = layer.in_features**-0.5 if fan_in_init else 0.02
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
