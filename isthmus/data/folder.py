"""Your own images: `folder:PATH`. How a folder is read, and the check of every file before training starts."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.data.images import Augmentation, ImageUint8, UnreadableImage, decode_image
from isthmus.data.source import ImageSource, choose_classes, logger, printable, report_skipped, rows_of_split
from isthmus.data.views import usable_processors
from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import cache_directory, sha256_of_parts, write_whole

_CHUNK = 512


@dataclass(frozen=True)
class Finding:
    """What decoding an image showed: its content hash (sha256, hex), and why it cannot be used ("" = it can)."""

    digest: str
    reason: str


def examine(
    keys: Sequence[str], read: Callable[[int], bytes], *, place: object, cache_dir: str | Path | None, what: str
) -> list[Finding]:
    """Decode image i from `read(i)` for every key, in threads; what was readable at `place` is remembered.

    `keys` name contents: a key that changes with the file (its size and time) is examined again. Images that were
    broken are examined at every start, since they may have been mended in place. Interrupted work is kept.
    """
    folder = cache_directory(cache_dir) / "checked"
    folder.mkdir(exist_ok=True)
    index_file = folder / f"{sha256_of_parts(place)[:16]}.json"
    known = _read_index(index_file)
    findings = {key: Finding(known[key], "") for key in keys if key in known}
    unknown = [i for i, key in enumerate(keys) if key not in findings]
    if unknown:
        bar = Display(f"checking {what}", len(unknown), "image")
        try:
            with bar, ThreadPoolExecutor(min(16, usable_processors())) as pool:
                for start in range(0, len(unknown), _CHUNK):
                    chunk = unknown[start : start + _CHUNK]
                    found = pool.map(lambda i: _examine_one(read, i), chunk)
                    findings.update(zip((keys[i] for i in chunk), found, strict=True))
                    bar.update(len(chunk))
        finally:
            readable = {key: finding.digest for key, finding in findings.items() if not finding.reason}
            write_whole(index_file, json.dumps(readable))
    return [findings[key] for key in keys]


def _examine_one(read: Callable[[int], bytes], index: int) -> Finding:
    try:
        data = read(index)
        decode_image(data)
    except UnreadableImage as error:
        return Finding("", str(error))
    except OSError as error:
        return Finding("", error.strerror or type(error).__name__)
    return Finding(hashlib.sha256(data).hexdigest(), "")


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
    """Image files by class, relative to the root, sorted; unlabelled images stand under the class ""."""

    train: dict[str, list[str]]
    val: dict[str, list[str]] | None
    notice: str
    bad_names: list[str]


def folder_layout(root: Path) -> Layout:
    """Read the tree under `root`. Hidden files and folders are ignored; nested files belong to the class above them.

    Folders train/ and val/, validation/ or test/ at the top are splits; any other sub-folders are classes. Raises
    UserError for a missing or empty folder, an empty class, images beside class folders, and splits beside classes.
    """
    if not root.exists():
        raise UserError(f"folder: needs an existing folder, got {root}. Check the path.")
    if not root.is_dir():
        raise UserError(f"folder: needs a folder of images, got the file {root}. Pass the folder it lies in.")
    bad_names: list[str] = []
    folders, images = _children(root, bad_names)
    by_name = {folder.name.lower(): folder for folder in folders}
    train_folder = next((by_name[name] for name in TRAIN_FOLDERS if name in by_name), None)
    if train_folder is None:
        val_only = [name for name in VAL_FOLDERS if name in by_name]
        if val_only and len(val_only) == len(folders):
            raise UserError(
                f"{root} has {', '.join(val_only)} but no train folder. Add one, or point at a folder of classes."
            )
        train = _classes(root, folders, images, root, bad_names)
        return Layout(train, None, "", bad_names)

    val_folder = next((by_name[name] for name in VAL_FOLDERS if name in by_name), None)
    others = [folder for folder in folders if folder.name.lower() not in (*TRAIN_FOLDERS, *VAL_FOLDERS)]
    beside = [folder.name for folder in others if _images_below(folder, root, [])] + [image.name for image in images]
    if beside:
        raise UserError(
            f"{root} has the split folder {train_folder.name}/, so all images must lie in splits, but there is also "
            f"{beside[0]}. Move it into {train_folder.name}/, or rename {train_folder.name}/ if it is a class."
        )
    train = _classes(train_folder, *_children(train_folder, bad_names), root, bad_names)
    val = _classes(val_folder, *_children(val_folder, bad_names), root, bad_names) if val_folder else None
    if val is not None and (unknown := [name for name in val if name not in train]):
        raise UserError(
            f"{root}: held-out images must belong to the classes of {train_folder.name}/, but {val_folder}/ has "
            f"{unknown[0] or 'images outside of class folders'}. Use the same sub-folders in both."
        )
    held_out = f"{val_folder.name}/ for held-out images" if val_folder else "a part of it for held-out images"
    notice = f"{train_folder.name}/ is used for training and {held_out} (splits, not classes)"
    return Layout(train, val, notice, bad_names)


def _classes(
    top: Path, folders: list[Path], images: list[Path], root: Path, bad_names: list[str]
) -> dict[str, list[str]]:
    by_class = {folder.name: _images_below(folder, root, bad_names) for folder in folders}
    flat = [str(image.relative_to(root)) for image in images]
    if not flat and not any(by_class.values()):
        raise UserError(f"{top} holds no images. Images end in .png, .jpg, .webp and the like, in sub-folders or flat.")
    if flat and any(by_class.values()):
        named = next(name for name, files in by_class.items() if files)
        raise UserError(
            f"{top} must hold either class folders or images, not both: got {images[0].name} beside {named}/. "
            "Move the images into a class folder."
        )
    if flat:
        return {"": flat}
    if empty := [name for name, files in by_class.items() if not files]:
        raise UserError(f"Every class needs an image, but {top / empty[0]} has none. Fill or remove that folder.")
    return by_class


def _images_below(folder: Path, root: Path, bad_names: list[str]) -> list[str]:
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


def _children(folder: Path, bad_names: list[str]) -> tuple[list[Path], list[Path]]:
    """Sub-folders and image files, sorted by name. Names that are not text are put aside into `bad_names`."""
    folders, images = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"Folders must be readable, got {folder} ({error.strerror}). Check its permissions.") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        is_folder = entry.is_dir()
        if not is_folder and Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        try:
            entry.name.encode("utf-8")
        except UnicodeEncodeError:
            bad_names.append(entry.name)
            continue
        (folders if is_folder else images).append(Path(entry.path))
    return folders, images


class FolderSource(ImageSource):
    """One split of a folder: its own train/ and val/ where it has them, else a split by content hash.

    Opening decodes every file that it does not know yet (results are remembered by path, size and time), so that broken
    ones are skipped, or with `strict` refused, before training. Raises UserError as `folder_layout` does, and for a
    class without a readable image.
    """

    augmentation = Augmentation()

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
        # Both splits are opened in a row: what was said about shared files need not be said twice.
        level = logging.INFO if split == "val" and layout.val is None else logging.WARNING
        if layout.notice:
            logger.log(logging.DEBUG if split == "val" else logging.INFO, "%s: %s", self.name, layout.notice)
        available = tuple(name for name in layout.train if name)
        self.class_names = choose_classes(available, classes, source=self.name)
        self.flip = np.ones(max(self.num_classes, 1), dtype=bool)

        own_split = layout.val if split == "val" else None
        by_class = layout.train if own_split is None else own_split
        pairs = [
            (file, label) for label, name in enumerate(self.class_names or ("",)) for file in by_class.get(name, [])
        ]
        files, labels, digests = self._readable(pairs, layout.bad_names, strict, level, cache_dir)
        missing = set(range(max(self.num_classes, 1))) - set(labels.tolist())
        if missing and own_split is None:
            name = self.class_names[min(missing)] if self.class_names else str(self.root)
            raise UserError(f"{self.name}: no image of {name} can be read. Mend its files or remove it.")
        if own_split is not None and not files:
            raise UserError(
                f"{self.name}: no held-out image can be used. Fill or remove the folder of held-out images."
            )

        chosen = np.arange(len(files))
        if layout.val is None:
            chosen = rows_of_split(digests, labels, val_fraction, split, source=self.name)
        self.files = [files[i] for i in chosen]
        self.labels = labels[chosen]
        contents = (f"{label}/{digests[i]}" for i, label in zip(chosen, self.labels, strict=True))
        self.fingerprint = sha256_of_parts("folder", *self.class_names, *self.files, *contents)

    def _readable(
        self, pairs: list[tuple[str, int]], bad_names: list[str], strict: bool, level: int, cache_dir: str | Path | None
    ) -> tuple[list[str], np.ndarray, list[str]]:
        """Files, labels and content hashes of the images that can be read."""
        findings = examine(
            [_content_key(self.root, file) for file, _ in pairs],
            lambda i: (self.root / pairs[i][0]).read_bytes(),
            place=self.root.resolve(),
            cache_dir=cache_dir,
            what=self.name,
        )
        broken = [(name, "its name is not valid text") for name in bad_names]
        broken += [(pair[0], found.reason) for pair, found in zip(pairs, findings, strict=True) if found.reason]
        report_skipped(self.name, broken, strict=strict, level=level)
        good = [i for i, found in enumerate(findings) if not found.reason]
        labels = np.array([pairs[i][1] for i in good], dtype=np.int64)
        return [pairs[i][0] for i in good], labels, [findings[i].digest for i in good]

    def load(self, index: int) -> ImageUint8:
        """Image `index` at full size. Raises UserError where the file has gone or changed since opening."""
        path = self.root / self.files[index]
        try:
            return decode_image(path.read_bytes())
        except (OSError, UnreadableImage) as error:
            raise UserError(
                f"{printable(str(path))} could be read at the start and cannot be read now ({error}). "
                "Restore it, or start again to leave it out."
            ) from error


def _content_key(root: Path, file: str) -> str:
    """A text that changes when the file does."""
    try:
        status = (root / file).stat()
    except OSError:  # a link to nowhere: reading it will say so
        return file
    return f"{file}|{status.st_size}|{status.st_mtime_ns}"
