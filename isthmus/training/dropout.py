"""Dropout whose masks belong to training positions, and its way into a Llama that knows none.

Masks are drawn again from their seeds wherever they are needed, so recomputed activations get the same ones.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from isthmus.functional.draws import EMBEDDING_DROPOUT, RESIDUAL_DROPOUT, stream

_SEEDS = 2**63


def sample_dropout(x: Float[Tensor, "b l width"], rate: float, seeds: Sequence[int]) -> Float[Tensor, "b l width"]:
    """Zero a share `rate` of the entries and scale up the others; the mask of each sample follows from its seed.

    >>> sample_dropout(torch.ones(1, 1, 64), 0.5, [3]).unique().tolist()
    [0.0, 2.0]
    """
    generator = torch.Generator(x.device)
    rows = [torch.rand(x.shape[1:], generator=generator.manual_seed(seed), device=x.device) >= rate for seed in seeds]
    return x * torch.stack(rows).to(x.dtype) / (1 - rate)


def embedding_seeds(positions: Int[Tensor, " b"], *, seed: int) -> list[int]:
    """One seed per training position."""
    return [int(stream(seed, EMBEDDING_DROPOUT, int(p)).integers(_SEEDS)) for p in positions]


def residual_seeds(positions: Int[Tensor, " b"], num_layers: int, *, seed: int) -> Int[Tensor, "b layers 2"]:
    """One seed per training position, layer and branch (attention, feed-forward)."""
    rows = [stream(seed, RESIDUAL_DROPOUT, int(p)).integers(_SEEDS, size=(num_layers, 2)) for p in positions]
    return torch.from_numpy(np.stack(rows))


class ResidualDropout:
    """Dropout of what attention and feed-forward add to the residual stream, as hooks on a stock Llama.

    Args:
        transformer: the Llama; it is not changed but for the hooks, while they are attached.
        rate: share that is zeroed, in [0, 1); 0 attaches nothing.

    Attributes:
        seeds: (b, layers, 2) of the batch that goes through next.
    """

    def __init__(self, transformer: LlamaForCausalLM, rate: float):
        self.transformer, self.rate = transformer, rate
        self.seeds: Int[Tensor, "b layers 2"] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on every `self_attn.o_proj` and `mlp`; they are gone afterwards, whatever happens."""
        handles = []
        try:
            if self.rate:
                for index, layer in enumerate(cast(Iterable[LlamaDecoderLayer], self.transformer.model.layers)):
                    branches: tuple[nn.Module, ...] = (layer.self_attn.o_proj, layer.mlp)
                    handles += [m.register_forward_hook(self._hook(index, k)) for k, m in enumerate(branches)]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, branch: int) -> Any:
        def drop(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
            assert self.seeds is not None, "the loop sets the seeds of a batch before it goes through"
            return sample_dropout(output, self.rate, self.seeds[:, layer, branch].tolist())

        return drop
