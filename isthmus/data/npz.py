"""Arrays: `npz:PATH` with images arr_0 uint8 (N, H, W, 3) and, where there are any, labels arr_1 (N,), `captions` (N,),
`groups` (N,) of images that a split keeps together, and one text `attribution`.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isthmus.data.captions import clean_caption, usable_captions
from isthmus.data.images import ImageUint8
from isthmus.data.source import ImageSource, choose_classes, rows_of_split
from isthmus.errors import UserError
from isthmus.files import sha256_of_parts
from isthmus.rgb import failure_words

_SAVE = "Save it with np.savez(file, images, labels)."
_ARRAYS = ("arr_0", "arr_1", "captions", "groups", "attribution")


class NpzSource(ImageSource):
    """One split of an .npz file, by a hash of an image's content or of its group, held in memory.

    Grey images may leave out the channel axis or have one channel; four channels are RGBA, composited on white. Labels
    are integers 0, 1, ... (class names "0", "1", ...) or texts (class names in alphabetical order). Captions are texts,
    groups texts or integers. Anything else is a UserError.
    """

    in_memory = True

    def __init__(
        self, path: str | Path, *, split: str = "train", classes: Sequence[str] | None = None, val_fraction: float = 0.1
    ) -> None:
        file = Path(os.path.expanduser(path))
        self.name = f"npz:{file.name}"
        arrays = _read(file)
        images = _as_rgb(arrays["arr_0"], self.name)
        available, all_labels = _class_names(arrays.get("arr_1"), len(images), self.name)
        self.class_names = choose_classes(available, classes, source=self.name)

        place = {available.index(name): i for i, name in enumerate(self.class_names)} or {0: 0}
        labels = np.array([place.get(label, -1) for label in all_labels.tolist()], dtype=np.int64)
        wanted = np.flatnonzero(labels >= 0)
        labels = labels[wanted]
        digests = [hashlib.sha256(images[i].tobytes()).hexdigest() for i in wanted]
        groups = _groups(arrays["groups"], len(images), self.name) if "groups" in arrays else None
        together = digests if groups is None else [groups[i] for i in wanted]
        chosen = rows_of_split(together, labels, val_fraction, split, source=self.name)
        self._images = images[wanted[chosen]]
        self.labels = labels[chosen]
        parts = ["npz", *self.class_names, *self.labels, *(digests[i] for i in chosen)]
        if "captions" in arrays:
            texts = _captions(arrays["captions"], len(images), self.name)
            quiet = split == "val"
            captions = usable_captions([texts[i] for i in wanted], source=self.name, where="captions", quiet=quiet)
            self.captions = tuple(captions[i] for i in chosen)
            parts += ["captions", *self.captions]
        if "attribution" in arrays:
            self.attribution = _attribution(arrays["attribution"], self.name)
        self.fingerprint = sha256_of_parts(*parts)

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
                raise UserError(f"npz: needs an .npz file, got a single array in {file}. {_SAVE}")
            if "arr_0" not in archive:
                held = ", ".join(archive.files) or "nothing"
                raise UserError(f"npz: needs the name arr_0, got {held} in {file}. {_SAVE}")
            return {name: archive[name] for name in archive.files if name in _ARRAYS}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"npz: {file} cannot be read ({failure_words(error)}). {_SAVE}") from error


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


def _class_names(raw: np.ndarray | None, count: int, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    if raw is None:
        return (), np.zeros(count, dtype=np.int64)
    if raw.shape != (count,) or raw.dtype.kind not in "iuU":
        raise UserError(
            f"{name}: arr_1 must hold {count} integers or texts, got {raw.dtype} {raw.shape}. One label per image."
        )
    values, labels = np.unique(raw, return_inverse=True)
    if raw.dtype.kind != "U" and not np.array_equal(values, np.arange(len(values))):
        wrong = f"{values[0]}" if values[0] < 0 else f"no image of class {min(set(range(len(values))) - set(values))}"
        raise UserError(
            f"{name}: labels must be 0..C-1 with an image for each, got {wrong}. Number the classes without gaps."
        )
    return tuple(str(value) for value in values), labels.astype(np.int64)


def _captions(raw: np.ndarray, count: int, name: str) -> list[str]:
    if raw.shape != (count,) or raw.dtype.kind != "U":
        raise UserError(
            f"{name}: captions must hold {count} texts, got {raw.dtype} {raw.shape}. Save them with "
            "np.savez(file, images, labels, captions=np.array(list_of_texts))."
        )
    return raw.tolist()


def _groups(raw: np.ndarray, count: int, name: str) -> list[str]:
    """Hashes of the groups, by image."""
    if raw.shape != (count,) or raw.dtype.kind not in "iuU":
        raise UserError(
            f"{name}: groups must hold {count} texts or integers, got {raw.dtype} {raw.shape}. "
            "Images with one value are trained on together or held out together."
        )
    return [hashlib.sha256(str(group).encode()).hexdigest() for group in raw.tolist()]


def _attribution(raw: np.ndarray, name: str) -> str:
    if raw.shape != () or raw.dtype.kind != "U":
        raise UserError(f"{name}: attribution must be one text, got {raw.dtype} {raw.shape}. Say who made the images.")
    return clean_caption(str(raw))
