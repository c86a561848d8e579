"""Data sets too large to keep: read through `datasets` as a stream, batch by batch, and continued where it stopped."""

from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from isthmus.data.augment import Augmentation, augmented_view
from isthmus.data.cache import sha256_of_parts
from isthmus.data.decode import ImageUint8, UnreadableImage, decode_image
from isthmus.data.huggingface import as_bytes, find_columns, image_bytes, load, name_and_split
from isthmus.data.source import ANY_COLUMNS, NO_LABELS, ImageSource, WantedColumns, logger, nearest
from isthmus.data.views import Batch, collate
from isthmus.data.workers import check_share
from isthmus.errors import UserError
from isthmus.functional.draws import AUGMENT, stream


class ImageStream:
    """A stream of labelled images: no index, no length, no held-out part.

    It has the attributes of an `ImageSource` that need neither. Images that cannot be read are skipped and counted, or
    refused with `strict`.
    """

    attribution = ""
    balanced = False
    augmentation = Augmentation()

    def __init__(self, dataset: Any, *, name: str, strict: bool = False, columns: WantedColumns = ANY_COLUMNS) -> None:
        """`dataset` is a `datasets.IterableDataset` with an image column."""
        self.name = name
        self.strict = strict
        self.columns = find_columns(dataset.features, source=name, wanted=columns)
        if self.columns.class_names is None:
            raise UserError(
                f"{name}: the classes of a stream are known before it is read, but {self.columns.label} only holds "
                f"their values. Read it without --stream, cast it to datasets.ClassLabel, or pass --label-column "
                f"{NO_LABELS} to train without labels."
            )
        self.dataset = as_bytes(dataset, self.columns)
        self.class_names = tuple(self.columns.class_names.values())
        self.flip: Bool[np.ndarray, " classes"] = np.ones(max(len(self.class_names), 1), dtype=bool)
        self.fingerprint = sha256_of_parts("stream", name, *self.class_names)
        self.num_skipped = 0

    @property
    def num_classes(self) -> int:
        """0 when unlabelled."""
        return len(self.class_names)

    def images(self) -> Iterator[tuple[ImageUint8, int]]:
        """One pass over images and labels, in the order of the data set."""
        for row in self.dataset:
            if (decoded := self.decode(row)) is not None:
                yield decoded

    def decode(self, row: dict[str, Any]) -> tuple[ImageUint8, int] | None:
        """Image and label of a row of `dataset`, or None where it cannot be used (said for the first three)."""
        try:
            image = decode_image(image_bytes(row[self.columns.image]))
            label = 0 if self.columns.label is None else row[self.columns.label]
            if label is None or not 0 <= label < max(self.num_classes, 1):
                raise UnreadableImage("it has no label")
        except (UnreadableImage, OSError) as error:
            self.num_skipped += 1
            if self.strict:
                raise UserError(
                    f"{self.name}: every image must be readable, got one that is not ({error}). "
                    "Mend it, or leave out --strict to skip it."
                ) from error
            if self.num_skipped <= 3:
                logger.warning(
                    "%s: skipped image number %d that cannot be used: %s", self.name, self.num_skipped, error
                )
            return None
        return image, int(label)


def open_stream(
    spec: str,
    *,
    strict: bool = False,
    cache_dir: str | Path | None = None,
    columns: WantedColumns = ANY_COLUMNS,
) -> ImageStream:
    """`hf:NAME_OR_PATH[:SPLIT]` as a stream (split train unless one is named). Raises UserError in words."""
    prefix, _, name = spec.partition(":")
    if prefix != "hf" or not name:
        raise UserError(f"Only hf:NAME[:SPLIT] can be streamed, got {spec!r}. Other data are read by index.")
    path, split = name_and_split(name)
    dataset = load(path, split, streaming=True, cache_dir=cache_dir)
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise UserError(
                f"{spec} has no split train, it has {', '.join(dataset)}.{nearest('train', dataset)} Name one."
            )
        dataset = dataset["train"]
    return ImageStream(dataset, name=spec, strict=strict, columns=columns)


class KeptImages(ImageSource):
    """The first images of a stream, kept in memory to measure on."""

    in_memory = True
    augmentation = Augmentation()

    def __init__(self, stream_: ImageStream, images: Sequence[ImageUint8], labels: Sequence[int]) -> None:
        """Images and labels in the order of the stream."""
        self.name, self.class_names, self.flip = stream_.name, stream_.class_names, stream_.flip
        self.fingerprint = stream_.fingerprint
        self.labels = np.asarray(labels, dtype=np.int64)
        self._images = list(images)

    def load(self, index: int) -> ImageUint8:
        """Image `index` at full size."""
        return self._images[index]


def hold_out(source: ImageStream, count: int) -> tuple[ImageStream, KeptImages]:
    """The stream without its first rows, and the `count` readable images of those rows.

    A stream has no split of its own by content; its first rows are the same at every start.
    """
    images, labels, rows = [], [], 0
    for row in source.dataset:
        rows += 1
        if (decoded := source.decode(row)) is not None:
            images.append(decoded[0])
            labels.append(decoded[1])
        if len(images) == count:
            break
    if not images:
        raise UserError(f"{source.name}: no image of the stream can be read. Check the data set.")
    rest = copy(source)
    rest.dataset = source.dataset.skip(rows)
    return rest, KeptImages(source, images, labels)


class StreamedBatches:
    """Endless batches from a stream, with a `state_dict` from which a new one continues at the right shard.

    `datasets` deals shards to the processes (or, where their number does not divide, every n-th example): other than
    for data read by index, the samples depend on `world_size`. Without a shuffle buffer a continued stream repeats and
    misses nothing; with one, examples that were in the buffer when it stopped may come again or be missed. Images that
    cannot be read leave no gap. Crops and flips are a pure function of (seed, position).
    """

    def __init__(
        self,
        source: ImageStream,
        *,
        image_size: int,
        seed: int,
        batch_size: int,
        augment: Augmentation | None = None,
        shuffle_buffer: int = 0,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`batch_size` counts images over all processes; `augment` None is the source's own; `state` continues."""
        from datasets.distributed import split_dataset_by_node

        check_share(batch_size, 0, rank, world_size)
        self._source, self._image_size, self._seed = source, image_size, seed
        self._share, self._rank, self._world_size = batch_size // world_size, rank, world_size
        self._augment = augment or source.augmentation
        dataset = source.dataset.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else source.dataset
        self._dataset = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
        state = state or {"epoch": 0, "position": 0, "dataset": None}
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._dataset.set_epoch(self._epoch)
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])
        self._rows = iter(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        views, labels, positions = [], [], []
        while len(views) < self._share:
            image, label = self._next_image()
            position = self._position * self._world_size + self._rank
            generator = stream(self._seed, AUGMENT, position)
            may_flip = bool(self._source.flip[label])
            views.append(augmented_view(image, self._image_size, self._augment, generator, may_flip=may_flip))
            labels.append(label)
            positions.append(position)
            self._position += 1
        return collate(views, np.array(labels), np.array(positions), np.array(positions))

    def _next_image(self) -> tuple[ImageUint8, int]:
        barren = False
        while True:
            for row in self._rows:
                if (decoded := self._source.decode(row)) is not None:
                    return decoded
            if barren:
                raise UserError(f"{self._source.name}: no image of the stream can be read. Check the data set.")
            barren = True
            self._epoch += 1
            self._dataset.set_epoch(self._epoch)
            self._rows = iter(self._dataset)

    def state_dict(self) -> dict[str, Any]:
        """Where this process's part stands, as JSON can hold it."""
        return {"epoch": self._epoch, "position": self._position, "dataset": self._dataset.state_dict()}
