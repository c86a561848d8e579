"""From the words of `--data` to a data set."""

import os
from collections.abc import Sequence
from pathlib import Path

from isthmus.data.source import ANY_COLUMNS, ImageSource, WantedColumns
from isthmus.errors import UserError, nearest

BUILT_IN = ("avatars", "emoji", "openmoji", "photos")
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
    max_images: int | None = None,
) -> ImageSource:
    """One split ("train", "val", or "reference" of avatars) of what `--data` names.

    That is `avatars[:STYLE,...]`, `emoji`, `openmoji`, `photos`, `folder:PATH`, `npz:PATH` or
    `hf:NAME_OR_PATH[:SPLIT]`.

    `image_size` (pixels) is the size at which drawings are rendered; other sets keep theirs. `classes` chooses and
    orders classes by name. `strict` refuses data with unreadable images instead of skipping those. `val_fraction` of
    the images are held out where the data set has no held-out part of its own (photos hold out a strip of each photo,
    of avatars a tenth is drawn beside). `columns` are those of an hf: table. `max_images` is the number of avatars to
    train on, or of a reference (None: 20,000). Raises UserError, before any training, for whatever cannot be used.
    """
    kind, place = parse_spec(spec)
    if split not in ("train", "val") and (kind, split) != ("avatars", "reference"):
        raise UserError(f"the split must be one of train, val, got {split!r}.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must lie in [0, 1), got {val_fraction}. 0.1 holds out a tenth.")
    check_columns(spec, columns)
    if max_images is not None and kind != "avatars":
        raise UserError(f"only avatars are drawn in any number, got {max_images} for {spec}. Leave out --max-images.")
    content = {"split": split, "classes": classes, "val_fraction": val_fraction}
    files = content | {"strict": strict, "cache_dir": cache_dir}
    # Each kind is imported where it is asked for: `datasets` alone costs seconds.
    match kind:
        case "avatars":
            from isthmus.data.avatars import DEFAULT_AVATARS, Avatars, styles_named

            number = DEFAULT_AVATARS if max_images is None else max_images
            options = {"split": split, "classes": classes, "num_images": number, "cache_dir": cache_dir}
            return Avatars(styles_named(place), image_size=image_size, **options)
        case "emoji" | "openmoji":
            from isthmus.data.emoji import OpenMoji, Twemoji

            drawings = Twemoji if kind == "emoji" else OpenMoji
            return drawings(image_size=image_size, cache_dir=cache_dir, **content)
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


def check_columns(spec: str, columns: WantedColumns) -> None:
    """Raise UserError where columns are asked for of data that have none."""
    if asked := [name for name in (columns.image, columns.label, columns.caption) if name is not None]:
        if parse_spec(spec)[0] != "hf":
            raise UserError(
                "--image-column, --caption-column and --label-column name columns of hf: data, "
                f"got {asked[0]} for {spec}. Leave them out."
            )


def class_names(spec: str, *, image_size: int, columns: WantedColumns = ANY_COLUMNS) -> tuple[str, ...]:
    """Names of all classes of a data set, for which no avatars are drawn; arguments as for `open_source`."""
    kind, place = parse_spec(spec)
    if kind != "avatars":
        return open_source(spec, image_size=image_size, columns=columns).class_names
    from isthmus.data.avatars import styles_named

    check_columns(spec, columns)
    return styles_named(place)


def parse_spec(spec: str) -> tuple[str, str]:
    """The kind of data and the place ("" for built-in sets; the styles of avatars, "" for all).

    UserError for anything else, with the nearest kind.
    """
    if spec in BUILT_IN:
        return spec, ""
    kind, colon, place = spec.partition(":")
    if kind == "avatars":
        if not place:
            raise UserError(f"avatars: needs styles after the colon, got {spec!r}. Write avatars for all of them.")
        return kind, place
    if kind in PREFIXES:
        if not place:
            raise UserError(f"{kind}: needs a place after the colon, got {spec!r}. Write {kind}:PATH.")
        return kind, place
    if spec and Path(os.path.expanduser(spec)).exists():
        written = "npz" if spec.endswith(".npz") else "folder"
        raise UserError(f"a path needs its kind in front, got {spec!r}. Write {written}:{spec}.")
    known = (*BUILT_IN, "avatars:", *(f"{prefix}:" for prefix in PREFIXES))
    raise UserError(
        "data must be one of avatars[:STYLE,...], emoji, openmoji, photos, folder:PATH, npz:PATH, hf:NAME[:SPLIT], "
        f"got {spec!r}.{nearest(kind + colon, known)}"
    )
