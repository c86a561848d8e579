"""Batches made by worker processes, which change nothing but the speed."""

import multiprocessing
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from isthmus.data.views import Batch, Sample
from isthmus.errors import UserError


def check_share(batch_size: int, start_position: int, rank: int, world_size: int) -> None:
    """Raise UserError unless a batch of `batch_size` divides over the processes and the numbers make sense."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"The batch size must be a positive multiple of the number of processes {world_size}, got {batch_size}. "
            f"Take {max(batch_size // world_size, 1) * world_size}."
        )
    if start_position < 0 or not 0 <= rank < world_size:
        raise UserError(
            f"Positions and ranks count from 0, got position {start_position}, rank {rank} of {world_size}."
        )


class _PositionBatches:
    """A batch sampler over a plain iterator."""

    def __init__(self, slices: Iterator[list[int]]) -> None:
        self.slices = slices

    def __iter__(self) -> Iterator[list[int]]:
        return self.slices


def worker_batches(dataset: Dataset[Sample], slices: Iterator[list[int]], num_workers: int) -> Iterator[Batch]:
    """The batches that `dataset.__getitems__` makes of these lists, in order, made by `num_workers` fresh processes."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["isthmus.data.batches"])  # import torch once, not once per worker
    loader = DataLoader(
        dataset,
        batch_sampler=_PositionBatches(slices),  # pyright: ignore[reportArgumentType]  (any iterable of lists will do)
        num_workers=num_workers,
        collate_fn=_already_a_batch,  # pyright: ignore[reportArgumentType]  (torch types it for lists alone)
        multiprocessing_context=context,
        worker_init_fn=_leave_interrupts_to_the_parent,
        pin_memory=torch.cuda.is_available(),
        # A loader seeds its workers from here; without it, it would draw from the global generator.
        generator=torch.Generator(),
    )
    return iter(loader)


def _already_a_batch(batch: Batch) -> Batch:
    return batch


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
