"""From the words of `--data` to a data set."""

import os
from collections.abc import Sequence
from pathlib import Path

from isthmus.data.source import ANY_COLUMNS, ImageSource, WantedColumns, check_fraction, check_split, nearest
from isthmus.errors import UserError

BUILT_IN = ("openmoji", "photos")
PREFIXES = ("folder", "npz", "hf")


def open_source(
    spec: str,
    *,
    image_size: int,
    split: str = "train",
    classes: Sequence[str] | None = None,
    strict: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    val_fraction: float = 0.1,
    columns: WantedColumns = ANY_COLUMNS,
) -> ImageSource:
    """One split ("train" or "val") of `openmoji`, `photos`, `folder:PATH`, `npz:PATH` or `hf:NAME_OR_PATH[:SPLIT]`.

    `image_size` (pixels) is the size at which drawings are rendered; other sets keep theirs. `classes` chooses and
    orders classes by name. `strict` refuses data with unreadable images instead of skipping those. `val_fraction` of
    the images are held out where the data set has no held-out part of its own (photos hold out a strip of each photo).
    `columns` are those of an hf: table.
    Raises UserError, before any training, for whatever cannot be used.
    """
    kind, place = parse_spec(spec)
    check_split(split)
    check_fraction(val_fraction)
    if kind != "hf" and columns != ANY_COLUMNS:
        raise UserError(
            f"--image-column and --label-column name columns of hf: data, got {columns.image or columns.label} for "
            f"{spec}. Leave them out."
        )
    cache = None if cache_dir is None else Path(cache_dir)
    # Each kind is imported where it is asked for: `datasets` alone costs seconds.
    match kind:
        case "openmoji":
            from isthmus.data.openmoji import OpenMoji

            return OpenMoji(
                image_size=image_size, split=split, classes=classes, val_fraction=val_fraction, cache_dir=cache
            )
        case "photos":
            from isthmus.data.photos import Photos

            return Photos(split=split, classes=classes)
        case "folder":
            from isthmus.data.folder import FolderSource

            return FolderSource(
                place, split=split, classes=classes, strict=strict, val_fraction=val_fraction, cache_dir=cache
            )
        case "npz":
            from isthmus.data.npz import NpzSource

            return NpzSource(place, split=split, classes=classes, val_fraction=val_fraction)
        case _:
            from isthmus.data.huggingface import HuggingFaceSource

            return HuggingFaceSource(
                place, split=split, classes=classes, strict=strict, val_fraction=val_fraction, cache_dir=cache,
                columns=columns,
            )  # fmt: skip


def parse_spec(spec: str) -> tuple[str, str]:
    """The kind of data and the place ("" for built-in sets). UserError for anything else, with the nearest kind."""
    if spec in BUILT_IN:
        return spec, ""
    kind, colon, place = spec.partition(":")
    if kind in PREFIXES and place:
        return kind, place
    if kind in PREFIXES:
        raise UserError(f"{kind}: needs a place after the colon, got {spec!r}. Write {kind}:PATH.")
    if spec and Path(os.path.expanduser(spec)).exists():
        written = "npz" if spec.endswith(".npz") else "folder"
        raise UserError(f"A path needs its kind in front, got {spec!r}. Write {written}:{spec}.")
    known = (*BUILT_IN, *(f"{prefix}:" for prefix in PREFIXES))
    raise UserError(
        f"Data must be one of openmoji, photos, folder:PATH, npz:PATH, hf:NAME[:SPLIT], got {spec!r}."
        f"{nearest(kind + colon, known)}"
    )
