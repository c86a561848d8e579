"""Your own images: `folder:PATH`."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isthmus.data.augment import Augmentation
from isthmus.data.cache import cache_directory, sha256_of_parts
from isthmus.data.decode import ImageUint8, UnreadableImage, decode_image
from isthmus.data.folder_layout import folder_layout
from isthmus.data.readability import examine
from isthmus.data.source import ImageSource, choose_classes, logger, printable, report_skipped
from isthmus.data.split import held_out
from isthmus.errors import UserError


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

        if layout.val is None:
            mask = held_out(digests, labels, val_fraction, source=self.name)
            chosen = np.flatnonzero(mask == (split == "val")) if mask.any() else np.arange(len(files))
        else:
            chosen = np.arange(len(files))
        self.files = [files[i] for i in chosen]
        self.labels = labels[chosen]
        contents = (f"{label}/{digests[i]}" for i, label in zip(chosen, self.labels, strict=True))
        self.fingerprint = sha256_of_parts("folder", *self.class_names, *self.files, *contents)

    def _readable(
        self,
        pairs: list[tuple[str, int]],
        bad_names: list[str],
        strict: bool,
        level: int,
        cache_dir: str | Path | None,
    ) -> tuple[list[str], np.ndarray, list[str]]:
        """Files, labels and content hashes of the images that can be read."""
        index_folder = cache_directory(cache_dir) / "checked"
        index_folder.mkdir(exist_ok=True)
        keys = [_content_key(self.root, file) for file, _ in pairs]
        findings = examine(
            keys,
            lambda i: (self.root / pairs[i][0]).read_bytes(),
            index_file=index_folder / f"{sha256_of_parts(self.root.resolve())[:16]}.json",
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
