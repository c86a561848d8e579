"""The processes of a launcher such as torchrun: how many, who am I, and wait for the others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from isthmus.errors import UserError


def process_count() -> int:
    """Processes that work together; one without a launcher. UserError where its variables cannot be used."""
    variables = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    said = ", ".join(f"{name}={value}" for name, value in variables.items() if value)
    if any(value and not value.isdecimal() for value in variables.values()):
        raise UserError(f"a launcher's variables are whole numbers, got {said}. Unset them, or start with torchrun.")
    count = int(variables["WORLD_SIZE"] or 1)
    if count > 1 and not variables["RANK"]:
        raise UserError(
            f"a launcher that starts several processes numbers them in RANK, got {said} alone. Start "
            "with torchrun or accelerate launch, or unset WORLD_SIZE for a single process."
        )
    return max(count, 1)


@dataclass(frozen=True)
class Processes:
    """Process `rank` of `count`; the first one writes what they share."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def agreed(self, value: str) -> str:
        """The first process's value, in all of them."""
        values = [value]
        if self.count > 1:
            distributed.broadcast_object_list(values)
        return values[0]

    def device(self, asked: str) -> str:
        """The device of this process: where "auto" or "cuda" is asked for, every process takes a GPU of its own."""
        if self.count > 1 and asked in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
        return asked


def is_first_process() -> bool:
    """Whether this is the first process of a launcher, or the only one there is; needs no connection to the others."""
    return int(os.environ.get("RANK") or 0) == 0


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that torchrun (or another launcher that sets its variables) started; one where there is none."""
    count = process_count()
    if count == 1:
        yield Processes()
        return
    ours = not distributed.is_initialized()
    if ours:
        # gloo on GPUs too: only barriers pass between them. Slow machines may wait for hours.
        distributed.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        if ours:
            distributed.destroy_process_group()
