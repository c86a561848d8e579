"""Images through the `datasets` library: `hf:NAME_OR_PATH[:SPLIT]`, as a table addressed by index."""

import errno
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.data.augment import Augmentation
from isthmus.data.cache import cache_directory, sha256_of_parts, writing_advice
from isthmus.data.decode import ImageUint8, UnreadableImage, decode_image
from isthmus.data.readability import examine
from isthmus.data.source import (
    ANY_COLUMNS,
    NO_LABELS,
    ImageSource,
    WantedColumns,
    choose_classes,
    logger,
    missing_extra,
    nearest,
    report_skipped,
)
from isthmus.data.split import held_out
from isthmus.errors import UserError

if TYPE_CHECKING:
    import datasets

_LABEL_NAMES = ("label", "labels")
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
    """What a table is read from.

    Attributes:
        image: column of the images.
        label: column of the labels; None: unlabelled.
        class_names: value in the label column -> name of the class, in the order of the classes. None: the values of
            the column tell, which are texts, whole numbers or truth values.
    """

    image: str
    label: str | None
    class_names: dict[Any, str] | None


def find_columns(features: "datasets.Features | None", *, source: str, wanted: WantedColumns = ANY_COLUMNS) -> Columns:
    """The columns asked for; else the first of images, and the first whose values are classes.

    Classes are a ClassLabel column, of which one named label or labels goes first. Where there is none, a column of
    that name with texts, whole numbers or truth values. What else could be meant is said.

    Raises:
        UserError: there is no such column, or it holds something else.
    """
    import datasets

    features = features or datasets.Features()
    image = _image_column(features, wanted.image, source)
    label = _label_column(features, wanted.label, image, source)
    if label is None:
        return Columns(image, None, {})
    kind = features[label]
    return Columns(image, label, dict(enumerate(kind.names)) if isinstance(kind, datasets.ClassLabel) else None)


def _image_column(features: Mapping[str, Any], wanted: str | None, source: str) -> str:
    import datasets

    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    if wanted is not None:
        _check_there(wanted, features, "--image-column", source)
        if wanted not in images and getattr(features[wanted], "dtype", "") not in ("binary", "large_binary"):
            raise UserError(
                f"{source}: a column of images holds images or the bytes of their files, got {wanted}, which is "
                f"{_type(features[wanted])}.{_others('--image-column', images)}"
            )
        return wanted
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
        _check_there(wanted, features, "--label-column", source)
        if wanted not in usable:
            raise UserError(
                f"{source}: a column of labels holds classes, texts or whole numbers, got {wanted}, which is "
                f"{_type(features[wanted])}.{_others('--label-column', usable)}"
            )
        return wanted
    named = sorted((name for name in usable), key=lambda name: name not in _LABEL_NAMES)
    chosen = [name for name in named if isinstance(features[name], datasets.ClassLabel)]
    chosen += [name for name in named if name in _LABEL_NAMES and name not in chosen]
    if chosen:
        rest = [name for name in usable if isinstance(features[name], datasets.ClassLabel) and name != chosen[0]]
        if rest:
            logger.info("%s: classes are those of %s.%s", source, chosen[0], _others("--label-column", rest))
        return chosen[0]
    for name in (name for name in _LABEL_NAMES if name in features and name != image):
        logger.warning(
            "%s: the column %s is %s, which cannot be classes: the images are read without labels.%s",
            source, name, _type(features[name]), _others("--label-column", usable),
        )  # fmt: skip
        return None
    if usable:
        logger.info(
            "%s: no column of classes, the images are read without labels.%s", source, _others("--label-column", usable)
        )
    return None


def _check_there(wanted: str, features: Mapping[str, Any], option: str, source: str) -> None:
    if wanted not in features:
        raise UserError(
            f"{option} must be a column of {source}, which has {', '.join(features) or 'none'}, got {wanted}."
            f"{nearest(wanted, features)}"
        )


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
    a part is held out by content hash. Images are decoded by us, and checked at opening as those of a folder are.
    Raises UserError for what cannot be loaded, for data without an image column, and for empty classes.
    """

    augmentation = Augmentation()

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
        table, is_own_split = _table_of_split(tables, asked, split, source=self.name)
        self._columns = find_columns(table.features, source=self.name, wanted=columns)
        names = self._names_of_classes(tables)
        self.class_names = choose_classes(tuple(names.values()), classes, source=self.name)
        self.flip = np.ones(max(self.num_classes, 1), dtype=bool)
        self._table = as_bytes(table, self._columns)

        rows, labels = self._wanted_rows(table, names)
        digests, reasons = self._examined(rows, cache_dir)
        broken = [(f"row {row}", reason) for row, reason in zip(rows, reasons, strict=True) if reason]
        # both splits are opened in a row: what was said about shared rows need not be said twice
        report_skipped(
            self.name,
            broken,
            strict=strict,
            level=logging.INFO if split == "val" and not is_own_split else logging.WARNING,
        )
        good = np.flatnonzero([not reason for reason in reasons])
        rows, labels, digests = rows[good], labels[good], [digests[i] for i in good]
        missing = set(range(max(self.num_classes, 1))) - set(labels.tolist())
        if missing and split == "train":
            empty = f"class {self.class_names[min(missing)]!r}" if self.class_names else "the data set"
            raise UserError(f"{self.name}: every class needs an image, but {empty} has none. Name the classes to use.")
        if not is_own_split:
            mask = held_out(digests, labels, val_fraction, source=self.name)
            chosen = np.flatnonzero(mask == (split == "val")) if mask.any() else np.arange(len(rows))
            rows, labels, digests = rows[chosen], labels[chosen], [digests[i] for i in chosen]
        self._rows, self.labels = rows, labels
        self.fingerprint = sha256_of_parts("hf", *self.class_names, *labels, *digests)

    def _names_of_classes(self, tables: Any) -> dict[Any, str]:
        """Value in the label column -> name of the class; where the values tell, those of the split train do."""
        if self._columns.class_names is not None or self._columns.label is None:
            return self._columns.class_names or {}
        label = self._columns.label
        table = tables.get("train", next(iter(tables.values()))) if isinstance(tables, dict) else tables
        values = table.unique(label)
        missing = [value for value in values if value is None or value == "" or (_is_whole(value) and value < 0)]
        if missing:
            raise UserError(
                f"{self.name}: every image needs a label, but {label} holds {missing[0]!r}. Use another split, another "
                f"--label-column, or --label-column {NO_LABELS}."
            )
        if 2 * len(values) > len(table):
            logger.warning(
                "%s: the column %s has %d different values in %d images. If these are no classes: --label-column %s",
                self.name, label, len(values), len(table), NO_LABELS,
            )  # fmt: skip
        return {value: str(value) for value in sorted(values)}

    def _wanted_rows(self, table: Any, names: Mapping[Any, str]) -> tuple[np.ndarray, np.ndarray]:
        label = self._columns.label
        if label is None:
            return np.arange(len(table)), np.zeros(len(table), dtype=np.int64)
        found = table[label][:]
        strange = next((value for value in found if value not in names), None) if set(found) - set(names) else None
        if strange is not None or None in found:
            what = "none" if strange is None or strange == -1 else f"{strange!r}, which the split train has not"
            raise UserError(f"{self.name}: every image needs a label, but some have {what}. Use another split.")
        place = {name: index for index, name in enumerate(self.class_names)}
        labels = np.array([place.get(names[value], -1) for value in found], dtype=np.int64)
        rows = np.flatnonzero(labels >= 0)
        return rows, labels[rows]

    def _examined(self, rows: np.ndarray, cache_dir: str | Path | None) -> tuple[list[str], list[str]]:
        folder = cache_directory(cache_dir) / "checked"
        folder.mkdir(exist_ok=True)
        findings = examine(
            [str(row) for row in rows],
            lambda i: self._bytes(int(rows[i])),
            index_file=folder / f"{sha256_of_parts(self._table._fingerprint)[:16]}.json",
            what=self.name,
        )
        return [found.digest for found in findings], [found.reason for found in findings]

    def _bytes(self, row: int) -> bytes:
        return image_bytes(self._table[row][self._columns.image])

    def load(self, index: int) -> ImageUint8:
        """Image `index` at full size."""
        return decode_image(self._bytes(int(self._rows[index])))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def load(path: str, split: str | None, *, streaming: bool, cache_dir: str | Path | None = None) -> Any:
    """A data set (with a split) or a dictionary of them, table or stream. Raises UserError in words."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise missing_extra("data", "datasets", error) from error

    local = Path(os.path.expanduser(path))
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            loaded = datasets.load_from_disk(str(local))
            if split is not None:
                if not isinstance(loaded, datasets.DatasetDict) or split not in loaded:
                    known = [str(name) for name in loaded] if isinstance(loaded, datasets.DatasetDict) else []
                    held = ", ".join(known) or "a single table"
                    raise UserError(f"hf:{path} has no split {split!r}, it has {held}.{nearest(split, known)}")
                loaded = loaded[split]
            return _as_streams(loaded) if streaming else loaded
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
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ):
        return writing_advice(error)
    if isinstance(error, ConnectionError):
        return "Check the connection, or download the data before and name their folder."
    if "gated" in str(error) or "authenticat" in str(error):
        return "Ask for access on its page, and log in: hf auth login."
    return "Check the name, the split and the connection."


def _as_streams(loaded: Any) -> Any:
    if isinstance(loaded, dict):
        return {name: _as_streams(table) for name, table in loaded.items()}
    return loaded.to_iterable_dataset(num_shards=min(64, max(1, len(loaded))))


def _table_of_split(tables: Any, asked: str | None, split: str, *, source: str) -> tuple[Any, bool]:
    """The table to read and whether it is wholly of this split."""
    if not isinstance(tables, dict):
        return tables, False
    if "train" not in tables:
        if len(tables) == 1:
            return next(iter(tables.values())), False
        raise UserError(f"{source} has no split train, it has {', '.join(tables)}. Name one: {source}:SPLIT.")
    val = next((name for name in _VAL_SPLITS if name in tables), None)
    if val is not None and split == "train":
        logger.info("%s: split %s is used for held-out images", source, val)
    return (tables["train"], val is not None) if split == "train" or val is None else (tables[val], True)


def as_bytes(table: Any, columns: Columns) -> Any:
    """The image (and label) columns alone, with images as files or bytes: decoding is ours."""
    import datasets

    kept = [columns.image] + ([columns.label] if columns.label else [])
    return table.select_columns(kept).cast_column(columns.image, datasets.Image(decode=False))


def image_bytes(value: Any) -> bytes:
    """The bytes of an undecoded image. Raises UnreadableImage where there are none."""
    if value is None:
        raise UnreadableImage("there is no image")
    if value.get("bytes") is not None:
        return value["bytes"]
    return Path(value["path"]).read_bytes()
