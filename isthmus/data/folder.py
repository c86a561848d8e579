"""Your own images: `folder:PATH`. How a folder is read, and the check of every file before training starts."""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from isthmus.data.captions import FoundCaptions, any_captions, captions_of_files, usable_captions
from isthmus.data.images import ImageUint8, UnreadableImage, decode_image
from isthmus.data.source import ImageSource, choose_classes, first_names, logger, rows_of_split
from isthmus.data.views import usable_processors
from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import cache_directory, sha256_of_parts, write_whole

_CHUNK = 512


def usable_images(
    source: ImageSource,
    names: Sequence[str],
    labels: Int[np.ndarray, " n"],
    read: Callable[[int], bytes],
    *,
    keys: Sequence[str],
    place: object,
    split: str,
    has_own_split: bool,
    val_fraction: float,
    strict: bool,
    cache_dir: str | Path | None,
    unreadable: Sequence[tuple[str, str]] = (),
) -> tuple[Int[np.ndarray, " rows"], list[str]]:
    """Which images of a split can be used, and the hashes of their files (sha256, hex).

    Image i is called `names[i]`, and `read(i)` gives the bytes of its file. `keys` and `place` as for `examine`;
    `unreadable` are (name, reason) pairs of others. The split goes by content unless the data has one of its own.
    Raises UserError for a class without an image, and with `strict` for images that cannot be read.
    """
    found = examine(keys, read, place=place, cache_dir=cache_dir, what=source.name)
    broken = [*unreadable, *((name, reason) for name, (_, reason) in zip(names, found, strict=True) if reason)]
    if broken and strict:
        raise UserError(
            f"{source.name}: every image must be readable, but {len(broken)} cannot be used: {_by_reason(broken)}. "
            "Mend or remove them, or leave out --strict to skip them."
        )
    if broken:
        # Both splits are opened in a row: what was said about shared files need not be said twice.
        level = logging.INFO if split == "val" and not has_own_split else logging.WARNING
        said = "%s: skipped %d images that cannot be used: %s"
        logger.log(level, said, source.name, len(broken), _by_reason(broken))
    rows = np.flatnonzero([not reason for _, reason in found])
    # a held-out part of its own may lack classes, but not every image
    present = set(labels[rows].tolist())
    missing = set(range(max(source.num_classes, 1))) - present
    if missing and not (split == "val" and has_own_split and present):
        what, then = f"the split {split}", ""
        if source.class_names and present:
            what, then = f"class {source.class_names[min(missing)]}", ", or leave it out"
        raise UserError(
            f"{source.name}: {what} needs an image that can be read, and has none. Fill it, or mend its files{then}."
        )
    if not has_own_split:
        hashes = [found[i][0] for i in rows]
        rows = rows[rows_of_split(hashes, labels[rows], val_fraction, split, source=source.name)]
    return rows, [found[i][0] for i in rows]


def _by_reason(broken: Sequence[tuple[str, str]]) -> str:
    """Every reason once, with the first names that it holds for.

    >>> _by_reason([("a", "empty"), ("b", "HEIC"), ("c", "HEIC"), ("d", "HEIC"), ("e", "HEIC")])
    'a (empty); b, c, d and 1 more (HEIC)'
    """
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in broken:
        names[reason].append(_printable(name))
    shown = list(names.items())[:5]
    rest = len(broken) - sum(len(some) for _, some in shown)
    parts = [f"{first_names(some, 3)} ({reason})" for reason, some in shown]
    return "; ".join(parts) + (f"; and {rest} more for other reasons" if rest else "")


def _printable(name: str) -> str:
    """A file name that any terminal and any JSON file can hold."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def examine(
    keys: Sequence[str], read: Callable[[int], bytes], *, place: object, cache_dir: str | Path | None, what: str
) -> list[tuple[str, str]]:
    """Decode image i from `read(i)` for every key, in threads: its hash, and why it cannot be used ("" = it can).

    What was readable at `place` is remembered by its key, which changes with the file (its size and time). Images that
    were broken are examined at every start, since they may have been mended in place. Interrupted work is kept.
    """
    folder = cache_directory(cache_dir) / "checked"
    folder.mkdir(exist_ok=True)
    index_file = folder / f"{sha256_of_parts(place)[:16]}.json"
    known = _read_index(index_file)
    found = {key: (known[key], "") for key in keys if key in known}
    unknown = [i for i, key in enumerate(keys) if key not in found]
    if unknown:
        try:
            with (
                Display(f"checking {what}", len(unknown), "image") as bar,
                ThreadPoolExecutor(min(16, usable_processors())) as pool,
            ):
                for start in range(0, len(unknown), _CHUNK):
                    chunk = unknown[start : start + _CHUNK]
                    results = pool.map(lambda i: _examine_one(read, i), chunk)
                    found.update(zip((keys[i] for i in chunk), results, strict=True))
                    bar.update(len(chunk))
        finally:
            write_whole(index_file, json.dumps({key: digest for key, (digest, _) in found.items() if digest}))
    return [found[key] for key in keys]


def _examine_one(read: Callable[[int], bytes], index: int) -> tuple[str, str]:
    try:
        data = read(index)
        decode_image(data)
    except UnreadableImage as error:
        return "", str(error)
    except OSError as error:
        return "", error.strerror or type(error).__name__
    return hashlib.sha256(data).hexdigest(), ""


def _read_index(index_file: Path) -> dict[str, str]:
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


# What counts as an image. The formats Pillow cannot read are listed too: they are reported, not overlooked.
_READABLE = (
    "png apng jpg jpeg jpe jfif bmp dib gif webp tif tiff ppm pgm pbm pnm tga avif jp2 j2k jpx ico pcx sgi qoi icns"
)
_UNREADABLE = "heic heif svg svgz psd xcf raw dng cr2 cr3 nef arw orf rw2 exr hdr jxl"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in f"{_READABLE} {_UNREADABLE}".split())

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "validation", "valid", "test")  # the first that is there


@dataclass(frozen=True)
class Layout:
    """Image files by class, relative to the root, sorted; unlabelled images are under ""."""

    train: dict[str, list[str]]
    val: dict[str, list[str]] | None
    notice: str
    bad_names: set[str]


def folder_layout(root: Path) -> Layout:
    """Read the tree under `root`. Hidden files and folders are ignored; nested files belong to the class above them.

    Folders train/ and val/, validation/ or test/ at the top are splits; any other sub-folders are classes. Raises
    UserError for a missing or empty folder, images beside class folders, and splits beside classes.
    """
    if not root.exists():
        raise UserError(f"folder: needs an existing folder, got {root}. Check the path.")
    if not root.is_dir():
        raise UserError(f"folder: needs a folder of images, got the file {root}. Pass the folder it lies in.")
    bad_names: set[str] = set()
    folders, images = _children(root, bad_names)
    by_name = {folder.name.lower(): folder for folder in folders}
    train_folder = next((by_name[name] for name in TRAIN_FOLDERS if name in by_name), None)
    val_folder = next((by_name[name] for name in VAL_FOLDERS if name in by_name), None)
    if train_folder is None:
        if val_folder is not None and all(name in VAL_FOLDERS for name in by_name):
            raise UserError(
                f"{root} has {', '.join(by_name)} but no train folder. Add one, or point at a folder of classes."
            )
        return Layout(_classes(root, root, bad_names), None, "", bad_names)

    others = [folder for folder in folders if folder.name.lower() not in (*TRAIN_FOLDERS, *VAL_FOLDERS)]
    beside = [folder.name for folder in others if _images_below(folder, root, set())]
    if beside := beside + [image.name for image in images]:
        raise UserError(
            f"{root} has the split folder {train_folder.name}/, so all images must lie in splits, but there is also "
            f"{beside[0]}. Move it into {train_folder.name}/, or rename {train_folder.name}/ if it is a class."
        )
    train = _classes(train_folder, root, bad_names)
    val = _classes(val_folder, root, bad_names) if val_folder else None
    if unknown := [name for name in val or {} if name not in train]:
        raise UserError(
            f"{root}: held-out images must belong to the classes of {train_folder.name}/, but {val_folder}/ has "
            f"{unknown[0] or 'images outside of class folders'}. Use the same sub-folders in both."
        )
    held_out = f"{val_folder.name}/ for held-out images" if val_folder else "a part of it for held-out images"
    notice = f"{train_folder.name}/ is used for training and {held_out} (splits, not classes)"
    return Layout(train, val, notice, bad_names)


def _classes(top: Path, root: Path, bad_names: set[str]) -> dict[str, list[str]]:
    folders, images = _children(top, bad_names)
    by_class = {folder.name: _images_below(folder, root, bad_names) for folder in folders}
    named = next((name for name, files in by_class.items() if files), None)
    if not images and named is None:
        raise UserError(f"{top} holds no images. Images end in .png, .jpg, .webp and the like, in sub-folders or flat.")
    if images and named is not None:
        raise UserError(
            f"{top} must hold either class folders or images, not both: got {images[0].name} beside {named}/. "
            "Move the images into a class folder."
        )
    return {"": [str(image.relative_to(root)) for image in images]} if images else by_class


def _images_below(folder: Path, root: Path, bad_names: set[str]) -> list[str]:
    found: list[str] = []
    pending, seen = [folder], set()
    while pending:
        here = pending.pop()
        real = here.resolve()
        if real in seen:  # a link back up
            continue
        seen.add(real)
        folders, images = _children(here, bad_names)
        pending += folders
        found += [str(image.relative_to(root)) for image in images]
    return sorted(found)


def _children(folder: Path, bad_names: set[str]) -> tuple[list[Path], list[Path]]:
    """Sub-folders and image files, sorted by name. Names that are not text are put aside into `bad_names`."""
    folders, images = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"folders must be readable, got {folder} ({error.strerror}). Check its permissions.") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        is_folder = entry.is_dir()
        if not is_folder and Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        try:
            entry.name.encode("utf-8")
        except UnicodeEncodeError:
            bad_names.add(entry.path)
            continue
        (folders if is_folder else images).append(Path(entry.path))
    return folders, images


class FolderSource(ImageSource):
    """One split of a folder: its own train/ and val/ where it has them, else a split by content hash.

    Opening examines its files (`usable_images`) and reads their captions (`captions_of_files`). Raises UserError as
    these and `folder_layout` do.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str = "train",
        classes: Sequence[str] | None = None,
        strict: bool = False,
        val_fraction: float = 0.1,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.root = Path(os.path.expanduser(path))
        layout = folder_layout(self.root)
        self.name = f"folder:{self.root.resolve().name}"
        if layout.notice:
            logger.log(logging.DEBUG if split == "val" else logging.INFO, "%s: %s", self.name, layout.notice)
        available = tuple(name for name in layout.train if name)
        self.class_names = choose_classes(available, classes, source=self.name)

        by_class = layout.val if split == "val" and layout.val is not None else layout.train
        of_classes = [by_class.get(name, []) for name in self.class_names or ("",)]
        files = [file for some in of_classes for file in some]
        labels = np.repeat(np.arange(len(of_classes)), [len(some) for some in of_classes])
        chosen, hashes = usable_images(
            self,
            files,
            labels,
            lambda i: (self.root / files[i]).read_bytes(),
            keys=[_content_key(self.root, file) for file in files],
            place=self.root.resolve(),
            split=split,
            has_own_split=layout.val is not None,
            val_fraction=val_fraction,
            strict=strict,
            cache_dir=cache_dir,
            unreadable=[(name, "its name is not valid text") for name in sorted(layout.bad_names)],
        )
        self.files = [files[i] for i in chosen]
        self.labels = labels[chosen]
        contents = (f"{label}/{digest}" for label, digest in zip(self.labels, hashes, strict=True))
        parts = ["folder", *self.class_names, *self.files, *contents]
        own_val = split == "val" and layout.val is not None
        told = captions_of_files(self.root, files, needed=not own_val)
        if told.texts is None and own_val:
            # beside training images that have captions, these say nothing
            trained_on = [file for name in self.class_names or ("",) for file in layout.train.get(name, [])]
            if any_captions(self.root, trained_on):
                told = FoundCaptions((None,) * len(files), f"{self.root}")
        if told.texts is not None:
            quiet = split == "val" and not own_val
            captions = usable_captions(told.texts, source=self.name, where=told.where, needed=not own_val, quiet=quiet)
            self.captions = tuple(captions[i] for i in chosen)
            parts += ["captions", *self.captions]
        self.fingerprint = sha256_of_parts(*parts)

    def load(self, index: int) -> ImageUint8:
        """Image `index` at full size. Raises UserError where the file has gone or changed since opening."""
        path = self.root / self.files[index]
        try:
            return decode_image(path.read_bytes())
        except (OSError, UnreadableImage) as error:
            raise UserError(
                f"{_printable(str(path))} could be read at the start and cannot be read now ({error}). "
                "Restore it, or start again to leave it out."
            ) from error


def _content_key(root: Path, file: str) -> str:
    """A text that changes when the file does."""
    try:
        status = (root / file).stat()
    except OSError:  # a link to nowhere: reading it will say so
        return file
    return f"{file}|{status.st_size}|{status.st_mtime_ns}"
