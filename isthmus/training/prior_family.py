"""What the loop of `train_prior` asks of a family; models and losses are the family's own business."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.data.views import Batch
from isthmus.training.ema import ExponentialMovingAverage


@runtime_checkable
class PriorFamily(Protocol):
    """Tokenizer, prior and images of one run, and what a loss is.

    Attributes:
        sharded: names of the modules that FSDP2 gathers one by one.
        tokenizer: frozen.
        encoder: what fills the token cache: the tokenizer, or the tokenizer under other schedules.
        network: the prior in training.
        train, held_out: images.
        image_size: side of the images in pixels.
        facts: what run.json keeps beside the run, and a continued run must share.
    """

    sharded: tuple[str, ...]
    tokenizer: Any
    encoder: Any
    network: Any
    train: ImageSource | ImageStream
    held_out: ImageSource
    image_size: int
    facts: dict[str, object]

    def __init__(self, run: Any) -> None: ...

    @staticmethod
    def has_unused_parameters(run: Any) -> bool:
        """Whether a step may leave parameters without a gradient."""
        ...

    @staticmethod
    def is_compiled(run: Any) -> bool:
        """Whether the blocks of the network go through `torch.compile`."""
        ...

    def place(self, device: torch.device) -> None:
        """Move what is frozen, previews included, to the device of the training."""
        ...

    def regularisation(self) -> AbstractContextManager[object]:
        """What holds while training and is no part of the network."""
        ...

    def losses(self, model: nn.Module, batch: Batch, step: int) -> Any:
        """Losses of one part of a batch; `total` is minimised."""
        ...

    def part_values(self, losses: Any, batch: Batch) -> dict[str, Tensor]:
        """What is averaged over parts and processes for the log."""
        ...

    def step_values(self, means: dict[str, Tensor], step: int) -> dict[str, float]:
        """One log line from those means."""
        ...

    def averaged(self, ema: ExponentialMovingAverage) -> Any:
        """A copy of the network that holds the averages; every process must call it where weights are sharded."""
        ...

    def token_ids(self, images: Tensor) -> Tensor:
        """(n, L) token ids of images in [-1, 1]."""
        ...

    def held_out_bits(self, model: Any, token_ids: Tensor, labels: Tensor) -> dict[str, float]:
        """Bits per token of held-out images."""
        ...

    def save_samples(self, model: Any, folder: Path, step: int) -> None:
        """A picture of samples at fixed seeds."""
        ...

    def export(self, accelerator: Accelerator, model: Any) -> Path:
        """Write the pipeline folder."""
        ...
