"""From the words of `--data` to a data set."""

import os
from collections.abc import Sequence
from pathlib import Path

from isthmus.data.source import ANY_COLUMNS, ImageSource, WantedColumns
from isthmus.errors import UserError, nearest

BUILT_IN = ("openmoji", "photos")
PREFIXES = ("folder", "npz", "hf")


def open_source(
    spec: str,
    *,
    image_size: int,
    split: str = "train",
    classes: Sequence[str] | None = None,
    strict: bool = False,
    cache_dir: str | Path | None = None,
    val_fraction: float = 0.1,
    columns: WantedColumns = ANY_COLUMNS,
) -> ImageSource:
    """One split ("train" or "val") of `openmoji`, `photos`, `folder:PATH`, `npz:PATH` or `hf:NAME_OR_PATH[:SPLIT]`.

    `image_size` (pixels) is the size at which drawings are rendered; other sets keep theirs. `classes` chooses and
    orders classes by name. `strict` refuses data with unreadable images instead of skipping those. `val_fraction` of
    the images are held out where the data set has no held-out part of its own (photos hold out a strip of each photo).
    `columns` are those of an hf: table. Raises UserError, before any training, for whatever cannot be used.
    """
    kind, place = parse_spec(spec)
    if split not in ("train", "val"):
        raise UserError(f"the split must be one of train, val, got {split!r}.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must lie in [0, 1), got {val_fraction}. 0.1 holds out a tenth.")
    if kind != "hf" and columns != ANY_COLUMNS:
        raise UserError(
            f"--image-column and --label-column name columns of hf: data, got {columns.image or columns.label} for "
            f"{spec}. Leave them out."
        )
    content = {"split": split, "classes": classes, "val_fraction": val_fraction}
    files = content | {"strict": strict, "cache_dir": cache_dir}
    # Each kind is imported where it is asked for: `datasets` alone costs seconds.
    match kind:
        case "openmoji":
            from isthmus.data.openmoji import OpenMoji

            return OpenMoji(image_size=image_size, cache_dir=cache_dir, **content)
        case "photos":
            from isthmus.data.photos import Photos

            return Photos(split=split, classes=classes)
        case "folder":
            from isthmus.data.folder import FolderSource

            return FolderSource(place, **files)
        case "npz":
            from isthmus.data.npz import NpzSource

            return NpzSource(place, **content)
        case _:
            from isthmus.data.huggingface import HuggingFaceSource

            return HuggingFaceSource(place, columns=columns, **files)


def parse_spec(spec: str) -> tuple[str, str]:
    """The kind of data and the place ("" for built-in sets). UserError for anything else, with the nearest kind."""
    if spec in BUILT_IN:
        return spec, ""
    kind, colon, place = spec.partition(":")
    if kind in PREFIXES:
        if not place:
            raise UserError(f"{kind}: needs a place after the colon, got {spec!r}. Write {kind}:PATH.")
        return kind, place
    if spec and Path(os.path.expanduser(spec)).exists():
        written = "npz" if spec.endswith(".npz") else "folder"
        raise UserError(f"a path needs its kind in front, got {spec!r}. Write {written}:{spec}.")
    known = (*BUILT_IN, *(f"{prefix}:" for prefix in PREFIXES))
    raise UserError(
        f"data must be one of {', '.join(BUILT_IN)}, folder:PATH, npz:PATH, hf:NAME[:SPLIT], got {spec!r}."
        f"{nearest(kind + colon, known)}"
    )
