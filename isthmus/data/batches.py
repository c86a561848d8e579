"""Samples by position and endless batches: what a training loop sees depends on (seed, position) alone."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch.utils.data import Dataset

from isthmus.data.augment import Augmentation, centre_view
from isthmus.data.order import SampleOrder
from isthmus.data.source import ImageSource
from isthmus.data.token_cache import TokenCache
from isthmus.data.views import Batch, Sample, collate, random_view
from isthmus.data.workers import check_share, usable_processors, worker_batches
from isthmus.functional.draws import AUGMENT, stream


class TrainingImages(Dataset[Sample]):
    """Augmented views by position: endless, every sample a pure function of (seed, position)."""

    def __init__(self, source: ImageSource, *, image_size: int, seed: int, augment: Augmentation | None = None) -> None:
        """`augment` None takes the augmentation that suits the source (`source.augmentation`)."""
        self.source, self.image_size, self.seed = source, image_size, seed
        self.augment = augment or source.augmentation
        self.in_memory = source.in_memory
        self._order = SampleOrder(source.labels, seed=seed, balanced=source.balanced)

    def __len__(self) -> int:
        """Images in an epoch; positions go on for ever."""
        return len(self.source)

    def __getitem__(self, position: int) -> Sample:
        return {name: rows[0] for name, rows in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        indices, _ = self._order.locate(np.asarray(positions, dtype=np.int64))
        views = [
            random_view(self.source, int(index), self.image_size, self.augment, stream(self.seed, AUGMENT, position))
            for index, position in zip(indices, positions, strict=True)
        ]
        return collate(views, self.source.labels[indices], indices, np.asarray(positions))


class EvaluationImages(Dataset[Sample]):
    """The images themselves, by index: shorter side resized, centre crop, no augmentation. "position" is the index."""

    def __init__(self, source: ImageSource, image_size: int) -> None:
        self.source, self.image_size = source, image_size
        self.in_memory = source.in_memory

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: rows[0] for name, rows in self.__getitems__([index % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = np.asarray(indices, dtype=np.int64)
        views = [centre_view(self.source.load(int(index)), self.image_size) for index in chosen]
        return collate(views, self.source.labels[chosen], chosen, chosen)


class CachedTokens(Dataset[Sample]):
    """Token ids by position from a `TokenCache`: each visit of an image takes its next view."""

    in_memory = True  # the operating system keeps what is used

    def __init__(self, cache: TokenCache, *, seed: int, balanced: bool) -> None:
        self.cache, self.seed = cache, seed
        self._order = SampleOrder(cache.labels, seed=seed, balanced=balanced)

    def __len__(self) -> int:
        """Images in an epoch; positions go on for ever."""
        return self.cache.num_images

    def __getitem__(self, position: int) -> Sample:
        return {name: rows[0] for name, rows in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        asked = np.asarray(positions, dtype=np.int64)
        indices, visits = self._order.locate(asked)
        rows = indices * self.cache.num_views + visits % self.cache.num_views
        return {
            "token_ids": torch.from_numpy(self.cache.token_ids[rows].astype(np.int64)),
            "class_label": torch.from_numpy(self.cache.labels[indices]),
            "index": torch.from_numpy(indices),
            "position": torch.from_numpy(asked),
        }


def training_batches(
    dataset: TrainingImages | CachedTokens,
    *,
    batch_size: int,
    start_position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | None = None,
) -> Iterator[Batch]:
    """Endless batches from `start_position` on; `batch_size` counts samples over all processes.

    Process `rank` of `world_size` gets its contiguous slice of every batch, so that all of them together see the same
    samples whatever their number. Neither worker processes nor resuming change a sample. `num_workers` None means no
    worker where samples are quick to make, else half of the processors. Workers are started afresh (not forked, which
    torch's threads do not survive), so a script that asks for them needs the usual `if __name__ == "__main__":`.
    Raises UserError where the batch does not divide over the processes.
    """
    check_share(batch_size, start_position, rank, world_size)
    if num_workers is None:
        num_workers = 0 if dataset.in_memory else min(8, usable_processors() // 2)
    slices = _slices(batch_size, start_position, rank, world_size)
    if num_workers == 0:
        return (dataset.__getitems__(positions) for positions in slices)
    return worker_batches(dataset, slices, num_workers)


def _slices(batch_size: int, start_position: int, rank: int, world_size: int) -> Iterator[list[int]]:
    share = batch_size // world_size
    for first in count(start_position + rank * share, batch_size):
        yield list(range(first, first + share))
