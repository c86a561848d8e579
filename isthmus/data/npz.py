"""Arrays: `npz:PATH` with arr_0 uint8 (N, H, W, 3) and, where the images are labelled, arr_1 (N,)."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isthmus.data.images import Augmentation, ImageUint8
from isthmus.data.source import ImageSource, choose_classes, rows_of_split
from isthmus.errors import UserError
from isthmus.files import sha256_of_parts


class NpzSource(ImageSource):
    """One split (by content hash) of an .npz file, held in memory.

    Grey images may leave out the channel axis or have one channel; four channels are RGBA, composited on white. Labels
    are integers 0, 1, ... (class names "0", "1", ...) or texts (class names in alphabetical order). Anything else is a
    UserError.
    """

    augmentation = Augmentation()
    in_memory = True

    def __init__(
        self, path: str | Path, *, split: str = "train", classes: Sequence[str] | None = None, val_fraction: float = 0.1
    ) -> None:
        file = Path(os.path.expanduser(path))
        self.name = f"npz:{file.name}"
        arrays = _read(file)
        images = _as_rgb(arrays["arr_0"], self.name)
        if "arr_1" in arrays:
            available, all_labels = _class_names(arrays["arr_1"], len(images), self.name)
        else:
            available, all_labels = (), np.zeros(len(images), dtype=np.int64)
        self.class_names = choose_classes(available, classes, source=self.name)
        self.flip = np.ones(max(self.num_classes, 1), dtype=bool)

        new_label = np.full(max(len(available), 1), -1)
        new_label[[available.index(name) for name in self.class_names] or [0]] = np.arange(max(self.num_classes, 1))
        wanted = np.flatnonzero(new_label[all_labels] >= 0)
        labels = new_label[all_labels[wanted]].astype(np.int64)
        digests = [hashlib.sha256(images[i].tobytes()).hexdigest() for i in wanted]
        chosen = rows_of_split(digests, labels, val_fraction, split, source=self.name)
        self._images = images[wanted[chosen]]
        self.labels = labels[chosen]
        self.fingerprint = sha256_of_parts("npz", *self.class_names, *self.labels, *(digests[i] for i in chosen))

    def load(self, index: int) -> ImageUint8:
        """Image `index`."""
        return self._images[index]


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"npz: needs an existing file, got {file}. Check the path.")
    try:
        # opened here: np.load leaves a broken archive open
        with file.open("rb") as handle:
            archive = np.load(handle, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(
                    f"npz: needs an .npz file, got a single array in {file}. Save with np.savez(file, images)."
                )
            if "arr_0" not in archive:
                held = ", ".join(archive.files) or "nothing"
                raise UserError(f"npz: needs the name arr_0, got {held} in {file}. Save with np.savez(file, images).")
            return {name: archive[name] for name in archive.files if name in ("arr_0", "arr_1")}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"npz: {file} cannot be read ({reason}). Save it with np.savez(file, images, labels)."
        ) from error


def _as_rgb(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise UserError(
            f"{name}: arr_0 must be uint8 of shape (N, H, W, 3), got {images.dtype} {images.shape}. "
            "Scale to 0..255 and put the channels last."
        )
    if images.shape[-1] == 4:
        alpha = images[..., 3:].astype(np.uint16)
        return ((images[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _class_names(raw: np.ndarray, count: int, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    if raw.shape != (count,) or raw.dtype.kind not in "iuU":
        raise UserError(
            f"{name}: arr_1 must hold {count} integers or texts, got {raw.dtype} {raw.shape}. One label per image."
        )
    if raw.dtype.kind == "U":
        names, labels = np.unique(raw, return_inverse=True)
        return tuple(str(text) for text in names), labels.astype(np.int64)
    labels = raw.astype(np.int64)
    empty = set(range(int(labels.max()) + 1)) - set(labels.tolist())
    if labels.min() < 0 or empty:
        wrong = f"{labels.min()}" if labels.min() < 0 else f"no image of class {min(empty)}"
        raise UserError(
            f"{name}: labels must be 0..C-1 with an image for each, got {wrong}. Number the classes without gaps."
        )
    return tuple(str(label) for label in range(int(labels.max()) + 1)), labels
