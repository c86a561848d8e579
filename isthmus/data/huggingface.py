"""Images through the `datasets` library: `hf:NAME_OR_PATH[:SPLIT]`, as a table or as a stream."""

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from isthmus.data.captions import clean_caption, usable_captions
from isthmus.data.folder import usable_images
from isthmus.data.images import Augmentation, ImageUint8, UnreadableImage, decode_image
from isthmus.data.source import (
    ANY_COLUMNS,
    NO_LABELS,
    ImageSource,
    ImageStream,
    StreamedImage,
    WantedColumns,
    choose_classes,
    logger,
    missing_extra,
)
from isthmus.data.views import Batch, check_share, random_views
from isthmus.errors import UserError, nearest
from isthmus.files import sha256_of_parts, writing_advice

if TYPE_CHECKING:
    import datasets

_LABEL_NAMES = ("label", "labels")
_CAPTION_NAMES = ("text", "caption", "captions", "prompt")
_VAL_SPLITS = ("validation", "val", "valid", "test")
# The name is as short as it can be, so that "a:train[:100]" is split "train[:100]" of "a" and not split "100]".
_NAME_AND_SPLIT = re.compile(r"(?P<name>.{2,}?):(?P<split>[A-Za-z_][\w.-]*(\[[^\]/\\]*\])?)")


def name_and_split(text: str) -> tuple[str, str | None]:
    """What follows "hf:" as (name or path, split or None). An existing path with a colon in it wins over a split."""
    if Path(os.path.expanduser(text)).exists():
        return text, None
    match = _NAME_AND_SPLIT.fullmatch(text)
    return (match["name"], match["split"]) if match else (text, None)


@dataclass(frozen=True)
class Columns:
    """Columns of images, of labels (None: unlabelled) and of captions (None: without).

    `class_names` maps values of the label column to names of classes, in the order of the classes. None: the values of
    the column tell, which are texts, whole numbers or truth values.
    """

    image: str
    label: str | None
    class_names: dict[Any, str] | None
    caption: str | None = None


def find_columns(features: "datasets.Features | None", *, source: str, wanted: WantedColumns = ANY_COLUMNS) -> Columns:
    """The columns asked for; else the first of images, and the first whose values are classes. Captions are asked for.

    Classes are a ClassLabel column, of which one named label or labels goes first. Where there is none, a column of
    that name with texts, whole numbers or truth values. What else could be meant is said. Raises UserError where there
    is no such column, or it holds something else.
    """
    import datasets

    features = features or datasets.Features()
    image = _image_column(features, wanted.image, source)
    label = _label_column(features, wanted.label, image, source)
    caption = _caption_column(features, wanted.caption, label, source)
    if label is None:
        return Columns(image, None, {}, caption)
    kind = features[label]
    names = dict(enumerate(kind.names)) if isinstance(kind, datasets.ClassLabel) else None
    return Columns(image, label, names, caption)


def _image_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str:
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if wanted is not None:
        usable = images + [name for name, kind in features.items() if _type(kind) in ("binary", "large_binary")]
        rule = "a column of images holds images or the bytes of their files"
        return _asked_for(wanted, usable, rule, "--image-column", features, source)
    if not images:
        held = ", ".join(f"{name} ({_type(kind)})" for name, kind in features.items())
        raise UserError(
            f"{source} needs a column of images, got {held or 'none'}. Cast it to datasets.Image(), or name a "
            "column of bytes with --image-column."
        )
    if len(images) > 1:
        logger.info("%s: images are those of %s.%s", source, images[0], _others("--image-column", images[1:]))
    return images[0]


def _label_column(features: Mapping[str, Any], wanted: str | None, image: str, source: str) -> str | None:
    import datasets

    usable = [name for name, kind in features.items() if name != image and _holds_classes(kind)]
    if wanted == NO_LABELS and wanted not in features:
        return None
    if wanted is not None:
        rule = "a column of labels holds classes, texts or whole numbers"
        return _asked_for(wanted, usable, rule, "--label-column", features, source)
    named = sorted(usable, key=lambda name: name not in _LABEL_NAMES)
    classes = [name for name in named if isinstance(features[name], datasets.ClassLabel)]
    if chosen := classes or [name for name in named if name in _LABEL_NAMES]:
        if others := _others("--label-column", classes[1:]):
            logger.info("%s: classes are those of %s.%s", source, chosen[0], others)
        return chosen[0]
    if name := next((name for name in _LABEL_NAMES if name in features and name != image), None):
        logger.warning(
            "%s: the column %s is %s, which cannot be classes: the images are read without labels.%s",
            source, name, _type(features[name]), _others("--label-column", usable),
        )  # fmt: skip
    elif usable:
        logger.info(
            "%s: no column of classes, the images are read without labels.%s", source, _others("--label-column", usable)
        )
    return None


def _caption_column(features: Mapping[str, Any], wanted: str | None, label: str | None, source: str) -> str | None:
    usable = [name for name, kind in features.items() if _type(kind) in ("string", "large_string")]
    if wanted is not None:
        return _asked_for(wanted, usable, "a column of captions holds texts", "--caption-column", features, source)
    if others := [name for name in usable if name in _CAPTION_NAMES and name != label]:
        logger.info("%s: images are read without captions.%s", source, _others("--caption-column", others))
    return None


def _asked_for(
    wanted: str, usable: Sequence[str], rule: str, option: str, features: Mapping[str, Any], source: str
) -> str:
    if wanted not in features:
        raise UserError(
            f"{option} must be a column of {source}, which has {', '.join(features) or 'none'}, got {wanted}."
            f"{nearest(wanted, features)}"
        )
    if wanted not in usable:
        raise UserError(f"{source}: {rule}, got {wanted}, which is {_type(features[wanted])}.{_others(option, usable)}")
    return wanted


def _holds_classes(kind: Any) -> bool:
    import datasets

    return isinstance(kind, datasets.ClassLabel) or (
        isinstance(kind, datasets.Value) and re.fullmatch(r"(large_)?string|u?int\d+|bool", kind.dtype) is not None
    )


def _type(kind: Any) -> str:
    """What a column holds, in a word."""
    return str(getattr(kind, "dtype", None) or type(kind).__name__)


def _others(option: str, names: Sequence[str]) -> str:
    return f" Others are chosen with {option}: {', '.join(names)}." if names else ""


class HuggingFaceSource(ImageSource):
    """One split of a data set of the Hugging Face hub, of its local files, or of `Dataset.save_to_disk`.

    Without SPLIT its own train and validation (or test) splits are used; with SPLIT, or without a validation split,
    a part is held out by content hash. Opening examines its images as those of a folder. Raises UserError as
    `usable_images` and `find_columns` do, and for what cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        classes: Sequence[str] | None = None,
        strict: bool = False,
        val_fraction: float = 0.1,
        cache_dir: str | Path | None = None,
        columns: WantedColumns = ANY_COLUMNS,
    ) -> None:
        path, asked = name_and_split(name)
        self.name = f"hf:{name}"
        tables = load(path, asked, streaming=False, cache_dir=cache_dir)
        train = train_split(tables, source=self.name)
        has_train = isinstance(tables, dict) and "train" in tables
        val = next((part for part in _VAL_SPLITS if part in tables), None) if has_train else None
        if val is not None and split == "train":
            logger.info("%s: split %s is used for held-out images", self.name, val)
        table = tables[val] if val is not None and split == "val" else train
        self._columns = find_columns(table.features, source=self.name, wanted=columns)
        names = self._names_of_classes(train)
        self.class_names = choose_classes(tuple(names.values()), classes, source=self.name)
        self._table = as_bytes(table, self._columns)

        rows, labels = self._wanted_rows(table, names)
        chosen, hashes = usable_images(
            self,
            [f"row {row}" for row in rows],
            labels,
            lambda i: self._bytes(int(rows[i])),
            keys=[str(row) for row in rows],
            place=self._table._fingerprint,
            split=split,
            has_own_split=val is not None,
            val_fraction=val_fraction,
            strict=strict,
            cache_dir=cache_dir,
        )
        self._rows, self.labels = rows[chosen], labels[chosen]
        parts = ["hf", *self.class_names, *self.labels, *hashes]
        if (column := self._columns.caption) is not None:
            found = table[column][:]
            own_val = val is not None and split == "val"
            captions = usable_captions(
                [found[row] for row in rows],
                source=self.name,
                where=f"the column {column}",
                needed=not own_val,
                quiet=split == "val" and not own_val,
            )
            self.captions = tuple(captions[i] for i in chosen)
            parts += ["captions", *self.captions]
        self.fingerprint = sha256_of_parts(*parts)

    def _names_of_classes(self, train: Any) -> dict[Any, str]:
        """Value in the label column -> name of the class; where the values tell, those of the split train do."""
        label = self._columns.label
        if self._columns.class_names is not None or label is None:
            return self._columns.class_names or {}
        values = train.unique(label)
        missing = [value for value in values if value in (None, "") or (isinstance(value, int) and value < 0)]
        if missing:
            raise UserError(
                f"{self.name}: every image needs a label, but {label} holds {missing[0]!r}. Use another split, another "
                f"--label-column, or --label-column {NO_LABELS}."
            )
        if 2 * len(values) > len(train):
            logger.warning(
                "%s: the column %s has %d different values in %d images. If these are no classes: --label-column %s",
                self.name, label, len(values), len(train), NO_LABELS,
            )  # fmt: skip
        return {value: str(value) for value in sorted(values)}

    def _wanted_rows(self, table: Any, names: Mapping[Any, str]) -> tuple[np.ndarray, np.ndarray]:
        label = self._columns.label
        if label is None:
            return np.arange(len(table)), np.zeros(len(table), dtype=np.int64)
        found = table[label][:]
        if set(found) - set(names):
            strange = next(value for value in found if value not in names)
            what = "none" if strange in (None, -1) else f"{strange!r}, which the split train has not"
            raise UserError(f"{self.name}: every image needs a label, but some have {what}. Use another split.")
        place = {name: index for index, name in enumerate(self.class_names)}
        labels = np.array([place.get(names[value], -1) for value in found], dtype=np.int64)
        rows = np.flatnonzero(labels >= 0)
        return rows, labels[rows]

    def _bytes(self, row: int) -> bytes:
        return image_bytes(self._table[row][self._columns.image])

    def load(self, index: int) -> ImageUint8:
        """Image `index` at full size."""
        return decode_image(self._bytes(int(self._rows[index])))


def load(path: str, split: str | None, *, streaming: bool, cache_dir: str | Path | None = None) -> Any:
    """A data set (with a split) or a dictionary of them; streams where they are not on disk, and `streaming` asks."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise missing_extra("data", "datasets", error) from error

    local = Path(os.path.expanduser(path))
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            if split is None:
                return loaded
            known = [str(name) for name in loaded] if isinstance(loaded, datasets.DatasetDict) else []
            if split not in known:
                held = ", ".join(known) or "a single table"
                raise UserError(f"hf:{path} has no split {split!r}, it has {held}.{nearest(split, known)}")
            return loaded[split]
        own_cache = str(Path(cache_dir) / "huggingface") if cache_dir else None
        name = str(local) if local.exists() else path
        return datasets.load_dataset(name, split=split, streaming=streaming, cache_dir=own_cache)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"hf:{path} could not be loaded: {reason.removesuffix('.')}. {_loading_advice(error)}"
        ) from error


def _loading_advice(error: Exception) -> str:
    cannot_write = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    if isinstance(error, OSError) and error.errno in cannot_write:
        return writing_advice(error)
    if isinstance(error, ConnectionError):
        return "Check the connection, or download the data before and name their folder."
    if "gated" in str(error) or "authenticat" in str(error):
        return "Ask for access on its page, and log in: hf auth login."
    return "Check the name, the split and the connection."


def train_split(tables: Any, *, source: str) -> Any:
    """The split train of what was loaded, or the only one there is."""
    if not isinstance(tables, dict):
        return tables
    if "train" not in tables and len(tables) > 1:
        raise UserError(f"{source} has no split train, it has {', '.join(tables)}. Name one: {source}:SPLIT.")
    return tables.get("train", next(iter(tables.values())))


def as_bytes(table: Any, columns: Columns) -> Any:
    """The columns that are read alone, with images as files or bytes: decoding is ours."""
    import datasets

    kept = [columns.image, columns.label, columns.caption]
    selected = table.select_columns([name for name in dict.fromkeys(kept) if name])
    return selected.cast_column(columns.image, datasets.Image(decode=False))


def image_bytes(value: Any) -> bytes:
    """The bytes of an undecoded image. Raises UnreadableImage where there are none."""
    if value is None:
        raise UnreadableImage("there is no image")
    if value.get("bytes") is not None:
        return value["bytes"]
    return Path(value["path"]).read_bytes()


class TableStream(ImageStream):
    """A table of images that is read from its start, without a held-out part.

    Images that cannot be read are skipped and counted, or refused with `strict`.
    """

    def __init__(self, dataset: Any, *, name: str, strict: bool = False, columns: WantedColumns = ANY_COLUMNS) -> None:
        """`dataset` is a `datasets.IterableDataset` with an image column."""
        self.name = name
        self.strict = strict
        self.columns = find_columns(dataset.features, source=name, wanted=columns)
        if self.columns.class_names is None:
            raise UserError(
                f"{name}: the classes of a stream must be known before it is read, but {self.columns.label} holds "
                f"values alone. Read it without --stream, cast it to datasets.ClassLabel, or pass --label-column "
                f"{NO_LABELS} to train without labels."
            )
        self.dataset = as_bytes(dataset, self.columns)
        self.class_names = tuple(self.columns.class_names.values())
        self.has_captions = self.columns.caption is not None
        captions = ["captions", self.columns.caption] if self.has_captions else []
        self.fingerprint = sha256_of_parts("stream", name, *self.class_names, *captions)
        self.num_skipped = 0

    def images(self) -> Iterator[StreamedImage]:
        """One pass over the images, in the order of the data set. UserError where none can be used."""
        barren = True
        for row in self.dataset:
            if (decoded := self.decode(row)) is not None:
                barren = False
                yield decoded
        if barren:
            raise UserError(f"{self.name}: no image of the stream can be read. Check the data set.")

    def decode(self, row: dict[str, Any]) -> StreamedImage | None:
        """The image of a row of `dataset`, or None where it cannot be used (said for the first three)."""
        try:
            image = decode_image(image_bytes(row[self.columns.image]))
            label = 0 if self.columns.label is None else row[self.columns.label]
            if label is None or not 0 <= label < max(self.num_classes, 1):
                raise UnreadableImage("it has no label")
        except (UnreadableImage, OSError) as error:
            if self.strict:
                raise UserError(
                    f"{self.name}: every image must be readable, got one that is not ({error}). "
                    "Mend it, or leave out --strict to skip it."
                ) from error
            self.num_skipped += 1
            if self.num_skipped <= 3:
                logger.warning("%s: skipped image %d that cannot be used: %s", self.name, self.num_skipped, error)
            return None
        caption = row[self.columns.caption] if self.columns.caption else None
        return StreamedImage(image, int(label), clean_caption(caption or ""))


def open_stream(spec: str, *, strict: bool = False, columns: WantedColumns = ANY_COLUMNS) -> TableStream:
    """`hf:NAME_OR_PATH[:SPLIT]` as a stream: the split named, else train, else the only one."""
    prefix, _, name = spec.partition(":")
    if prefix != "hf" or not name:
        raise UserError(f"only hf:NAME[:SPLIT] can be streamed, got {spec!r}. Leave out --stream.")
    path, split = name_and_split(name)
    dataset = train_split(load(path, split, streaming=True), source=spec)
    if hasattr(dataset, "to_iterable_dataset"):  # a table on disk
        dataset = dataset.to_iterable_dataset(num_shards=min(64, max(1, len(dataset))))
    return TableStream(dataset, name=spec, strict=strict, columns=columns)


class StreamedImages(ImageSource):
    """Images of a stream that are kept in memory."""

    in_memory = True

    def __init__(self, stream_: ImageStream, images: Sequence[StreamedImage]) -> None:
        self.name, self.class_names, self.fingerprint = stream_.name, stream_.class_names, stream_.fingerprint
        self.labels = np.array([one.label for one in images], dtype=np.int64)
        self.captions = [one.caption for one in images] if stream_.has_captions else None
        self._images = [one.image for one in images]

    def load(self, index: int) -> ImageUint8:
        """Image `index` at full size."""
        return self._images[index]


def hold_out(source: TableStream, count: int) -> tuple[TableStream, StreamedImages]:
    """The stream without its first rows, and the `count` readable images of those rows.

    A stream has no split of its own by content; its first rows are the same at every start.
    """
    skipped_before = source.num_skipped
    images = list(islice(source.images(), count))
    rest = copy(source)
    rest.dataset = source.dataset.skip(len(images) + source.num_skipped - skipped_before)
    return rest, StreamedImages(source, images)


class StreamedBatches:
    """Endless batches from a stream, with a `state_dict` from which a new one continues at the right shard.

    `datasets` deals shards to the processes (or, where their number does not divide, every n-th example): other than
    for data read by index, the samples depend on `world_size`. Without a shuffle buffer a continued stream repeats and
    misses nothing; with one, examples that were in the buffer when it stopped may come again or be missed. Images that
    cannot be read leave no gap. Crops and flips are a pure function of (seed, position).
    """

    def __init__(
        self,
        source: TableStream,
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
        positions = (self._position + np.arange(self._share)) * self._world_size + self._rank
        self._position += self._share
        # view by view: whole images of a batch can take gigabytes
        parts = [
            random_views(
                StreamedImages(self._source, [self._next_image()]), np.zeros(1, np.int64), positions[i : i + 1],
                self._image_size, self._augment, self._seed,
            )
            for i in range(self._share)
        ]  # fmt: skip
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return batch | {"index": batch["position"]}

    def _next_image(self) -> StreamedImage:
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
