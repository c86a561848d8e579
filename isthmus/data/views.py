"""Training views of images, put together to batches; by worker processes, which change nothing but the speed."""

import multiprocessing
import os
import pickle
import signal
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from isthmus.data.images import Augmentation, SquareView, augmented_view
from isthmus.data.source import ImageSource
from isthmus.errors import UserError
from isthmus.nn.draws import AUGMENT, stream

Sample = dict[str, Tensor]
"""One sample: "image" float (3, S, S) in [-1, 1] or "token_ids" (L,); "class_label", "index", "position"."""

Batch = dict[str, Tensor]
"""The same with a batch axis in front."""


class BatchedDataset(Dataset[Sample], ABC):
    """Samples that are made by the batch."""

    in_memory: bool
    """Making a sample is so quick that worker processes would only cost time."""

    def __getitem__(self, position: int) -> Sample:
        return {name: rows[0] for name, rows in self.batch([position]).items()}

    @abstractmethod
    def batch(self, positions: Sequence[int]) -> Batch:
        """The samples of these positions."""


def random_view(
    source: ImageSource, index: int, image_size: int, augment: Augmentation, generator: np.random.Generator
) -> SquareView:
    """One training view of image `index`; the generator first draws the raw material, then the augmentation."""
    raw = source.draw(index, generator)
    return augmented_view(raw, image_size, augment, generator, may_flip=bool(source.flip[source.labels[index]]))


def random_views(
    source: ImageSource,
    indices: Int[np.ndarray, " b"],
    positions: Int[np.ndarray, " b"],
    image_size: int,
    augment: Augmentation,
    seed: int,
) -> Batch:
    """One training view of each of these images; its random numbers follow from (seed, position)."""
    views = [
        random_view(source, int(index), image_size, augment, stream(seed, AUGMENT, int(position)))
        for index, position in zip(indices, positions, strict=True)
    ]
    return collate(views, source.labels[indices], indices, positions)


def collate(
    views: Sequence[SquareView],
    labels: Int[np.ndarray, " b"],
    indices: Int[np.ndarray, " b"],
    positions: Int[np.ndarray, " b"],
) -> Batch:
    """Views 0..255 and their numbers as one batch of tensors, images in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()
    return {
        "image": pixels.float().div_(127.5).sub_(1),
        "class_label": torch.from_numpy(labels.astype(np.int64)),
        "index": torch.from_numpy(indices.astype(np.int64)),
        "position": torch.from_numpy(positions.astype(np.int64)),
    }


# batches that a worker is asked for before the first of them is used
_AHEAD = 2


def check_share(batch_size: int, start_position: int, rank: int, world_size: int) -> None:
    """Raise UserError unless a batch of `batch_size` divides over the processes and the numbers make sense."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"the batch size must be a positive multiple of the number of processes {world_size}, got {batch_size}. "
            f"Take {max(batch_size // world_size, 1) * world_size}."
        )
    if start_position < 0 or not 0 <= rank < world_size:
        raise UserError(
            f"positions and ranks count from 0, got position {start_position}, rank {rank} of {world_size}."
        )


def usable_processors() -> int:
    """Processors that this process may run on: a batch system or a container may leave it few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A fresh process that makes batches, and the pipe to it.

    Arrays go through the pipe as bytes: containers have little shared memory, and nothing here needs any. A process
    that dies closes its end, which ends every wait for it.
    """

    def __init__(self, context: BaseContext, dataset: BatchedDataset) -> None:
        self._pipe, other_end = context.Pipe()
        self._process: Any = context.Process(target=_serve, args=(other_end, dataset), daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
        self._process.start()
        other_end.close()
        # it ignores SIGTERM, with which Python would end it at exit
        Finalize(self, self._process.kill, exitpriority=10)

    def ask(self, positions: list[int]) -> None:
        """Let it make the batch of these positions."""
        try:
            self._pipe.send(positions)
        except OSError as error:
            raise self._died() from error

    def answer(self) -> Batch:
        """The batch that was asked for first, as soon as it is made."""
        try:
            described = self._pipe.recv()
            if isinstance(described, Exception):
                raise described
            batch = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described.items()}
            for tensor in batch.values():
                self._pipe.recv_bytes_into(_bytes_of(tensor))
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if torch.cuda.is_available() else batch

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _died(self) -> UserError:
        self._process.join(10)
        return UserError(
            f"processes that read images must stay alive, got one that ended with code {self._process.exitcode} (-9: "
            "killed, mostly because memory ran out). Pass a smaller --num-workers, or 0 to read without; a script that "
            'asks for workers starts with `if __name__ == "__main__":`.'
        )


def worker_batches(dataset: BatchedDataset, slices: Iterator[list[int]], num_workers: int | None) -> Iterator[Batch]:
    """The batches that `dataset.batch` makes of these lists, in order, made by `num_workers` fresh processes.

    0 makes them in this one; None is 0 where samples are quick to make, else half of the processors, at most 8. Raises
    UserError where a process died.
    """
    if num_workers is None:
        num_workers = 0 if dataset.in_memory else min(8, usable_processors() // 2)
    if num_workers == 0:
        return map(dataset.batch, slices)
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["isthmus.data.batches"])  # import torch once, not once per worker
    return _in_turn([_Worker(context, dataset) for _ in range(num_workers)], slices)


def _in_turn(workers: list[_Worker], slices: Iterator[list[int]]) -> Iterator[Batch]:
    """Every worker has two lists to work on; a thread takes the batches over while the caller uses earlier ones."""
    # a thread starts on the first GPU, where pinning would take memory; -1 is no GPU at all
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    reader = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))
    due: deque[tuple[_Worker, Future[Batch]]] = deque()
    try:
        # an epoch may have fewer lists than the workers could take at once
        for worker, positions in zip(workers * _AHEAD, slices, strict=False):
            worker.ask(positions)
            due.append((worker, reader.submit(worker.answer)))
        while due:
            worker, batch = due.popleft()
            yield batch.result()
            for positions in islice(slices, 1):
                worker.ask(positions)
                due.append((worker, reader.submit(worker.answer)))
    finally:
        for worker in workers:
            worker.close()
        reader.shutdown(cancel_futures=True)


def _serve(pipe: Connection, dataset: BatchedDataset) -> None:
    """A worker's life: lists of positions in, batches out, until the other end is closed."""
    # the parent decides what a signal means, also one that reaches all its processes
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        while True:
            positions = pipe.recv()
            try:
                batch = dataset.batch(positions)
            except Exception as error:
                pipe.send(_as_sent(error))
                continue
            pipe.send({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()})
            for tensor in batch.values():
                pipe.send_bytes(_bytes_of(tensor.contiguous()))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy().reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType]  an array is a buffer


def _as_sent(error: Exception) -> Exception:
    """The error with its traceback in words; where it cannot be sent, the words alone."""
    words = "".join(traceback.format_exception(error))
    try:
        error.add_note(words)
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(words)
