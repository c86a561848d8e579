"""How a folder of images is read: sub-folders are classes or splits, or the images lie flat."""

import os
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import UserError

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
