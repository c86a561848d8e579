"""Samples by position and endless batches: what a training loop sees depends on (seed, position) alone."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import numpy as np
import torch
from jaxtyping import Int

from isthmus.data.images import Augmentation, centre_view
from isthmus.data.source import ImageSource
from isthmus.data.token_cache import TokenCache
from isthmus.data.views import Batch, BatchedDataset, Sample, check_share, collate, random_views, worker_batches
from isthmus.errors import UserError
from isthmus.nn.draws import ORDER, stream

_EPOCHS, _ROTATIONS, _MEMBERS = 0, 1, 2


class SampleOrder:
    """Position (0, 1, 2, ...) to (image index, visit): `visit` counts how often that image was seen before.

    Unbalanced: every epoch is a fresh permutation of all images. Balanced: each block of C positions holds every class
    once, in a shuffled rotation, and each class walks through its own images epoch by epoch. The last permutations are
    kept, so walking forward is quick, and any position can be asked for at any time.
    """

    def __init__(self, labels: Int[np.ndarray, " n"], *, seed: int, balanced: bool) -> None:
        self.seed = seed
        self.num_images = len(labels)
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)] if balanced else []
        self._kept: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}

    def locate(self, positions: Int[np.ndarray, " b"]) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
        """Positions to indices and visits."""
        if len(positions) and positions.min() < 0:
            raise UserError(f"positions count from 0, got {positions.min()}.")
        locate = self._locate_balanced if self._members else self._locate_in_epoch
        indices, visits = np.array([locate(int(p)) for p in positions], dtype=np.int64).reshape(-1, 2).T
        return indices, visits

    def _locate_in_epoch(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_images)
        order = self._drawn(lambda generator: generator.permutation(self.num_images), _EPOCHS, 0, epoch)
        return int(order[place]), epoch

    def _locate_balanced(self, position: int) -> tuple[int, int]:
        num_classes = len(self._members)
        block, slot = divmod(position, num_classes)
        # Rotations are made in groups: one random stream per block would cost more than the lookup.
        group_size = max(1, 4096 // num_classes)
        group, row = divmod(block, group_size)
        rows = (group_size, 1)
        rotations = self._drawn(lambda g: g.permuted(np.tile(np.arange(num_classes), rows), axis=1), _ROTATIONS, group)
        chosen = int(rotations[row, slot])
        members = self._members[chosen]
        # A class stands in every block exactly once, so the block number counts its visits.
        visit, place = divmod(block, len(members))
        order = self._drawn(lambda generator: generator.permutation(len(members)), _MEMBERS, chosen, visit)
        return int(members[order[place]]), visit

    def _drawn(self, draw: Callable[[np.random.Generator], np.ndarray], *path: int) -> np.ndarray:
        """What is drawn from the stream at `path`; of paths that differ in the last number, the latest is kept."""
        *place, number = path
        kept = self._kept.get(tuple(place))
        if kept is None or kept[0] != number:
            kept = self._kept[tuple(place)] = number, draw(stream(self.seed, ORDER, *path))
        return kept[1]


class TrainingImages(BatchedDataset):
    """Augmented views by position: endless, every sample a pure function of (seed, position)."""

    def __init__(self, source: ImageSource, *, image_size: int, seed: int, augment: Augmentation | None = None) -> None:
        """`augment` None takes the augmentation that suits the source (`source.augmentation`)."""
        self.source, self.image_size, self.seed = source, image_size, seed
        self.augment = augment or source.augmentation
        self.in_memory = source.in_memory
        self._order = SampleOrder(source.labels, seed=seed, balanced=source.balanced)

    def batch(self, positions: Sequence[int]) -> Batch:
        """See `BatchedDataset`."""
        asked = np.asarray(positions, dtype=np.int64)
        indices, _ = self._order.locate(asked)
        return random_views(self.source, indices, asked, self.image_size, self.augment, self.seed)


class EvaluationImages(BatchedDataset):
    """The images themselves, by index: shorter side resized, centre crop, no augmentation. "position" is the index."""

    def __init__(self, source: ImageSource, image_size: int) -> None:
        self.source, self.image_size = source, image_size
        self.in_memory = source.in_memory

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return super().__getitem__(index % len(self))

    def batch(self, indices: Sequence[int]) -> Batch:
        """See `BatchedDataset`."""
        chosen = np.asarray(indices, dtype=np.int64)
        views = [centre_view(self.source.load(int(index)), self.image_size) for index in chosen]
        return collate(views, self.source.labels[chosen], chosen, chosen)


class CachedTokens(BatchedDataset):
    """Token ids by position from a `TokenCache`: each visit of an image takes its next view.

    "index" is the image, so that `cache.captions[index]` is what it shows in words.
    """

    in_memory = True  # the operating system keeps what is used

    def __init__(self, cache: TokenCache, *, seed: int, balanced: bool) -> None:
        self.cache, self.seed = cache, seed
        self._order = SampleOrder(cache.labels, seed=seed, balanced=balanced)

    def batch(self, positions: Sequence[int]) -> Batch:
        """See `BatchedDataset`."""
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
    dataset: BatchedDataset,
    *,
    batch_size: int,
    start_position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | None = None,
) -> Iterator[Batch]:
    """Endless batches from `start_position` on, of data with a sample at every position.

    `batch_size` counts samples over all processes: process `rank` of `world_size` gets its contiguous slice of every
    batch, so that all of them together see the same samples whatever their number. Neither worker processes
    (`worker_batches`) nor resuming change a sample. UserError where the batch does not divide over the processes.
    """
    check_share(batch_size, start_position, rank, world_size)
    share = batch_size // world_size
    slices = (list(range(first, first + share)) for first in count(start_position + rank * share, batch_size))
    return worker_batches(dataset, slices, num_workers)
