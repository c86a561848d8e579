"""The samples of an evaluation on disk: chunks of fixed size that appear whole, so that a killed run goes on.

Chunk c holds images c * CHUNK ... (c + 1) * CHUNK - 1, whatever the batch size or the number of processes.
"""

import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from isthmus.errors import UserError
from isthmus.files import write_whole

logger = logging.getLogger("isthmus")

CHUNK = 250
_FEATURES = "features/"


@dataclass(frozen=True)
class SampleChunk:
    """Consecutive samples.

    Attributes:
        images: 0..255, as everything is measured.
        labels: class ids of the model; the null id where no class was asked for.
        token_ids: all steps of an image in a row; no column where the images came from elsewhere.
        features: space -> features of the images, one row each.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]
    token_ids: Int[np.ndarray, "n l"]
    features: dict[str, Float[np.ndarray, "n _"]]

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "SampleChunk":
        """The first `count` of them."""
        features = {space: rows[:count] for space, rows in self.features.items()}
        return SampleChunk(self.images[:count], self.labels[:count], self.token_ids[:count], features)


class ChunkStore:
    """A folder of chunks made with one set of settings.

    Args:
        folder: may be missing; it is made when the first chunk is written.
        settings: everything the samples and their features depend on, in JSON values. Stored in every chunk.

    Raises:
        UserError: the folder holds something else, or chunks with other settings; the message says which.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, dict(settings)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"samples lie in a folder, got the file {folder}. Choose another --out.")
        present = sorted(folder.iterdir()) if folder.exists() else []
        foreign = [path.name for path in present if not _is_ours(path)]
        if foreign:
            raise UserError(
                f"the folder of samples must be new or hold chunks alone, got {foreign[0]} in {folder}. "
                "Choose another --out."
            )
        for path in present:
            self._check(path)

    def path(self, chunk: int) -> Path:
        """File of a chunk."""
        return self.folder / f"chunk_{chunk:05d}.npz"

    def missing(self, num: int) -> list[int]:
        """Chunks that still have to be drawn for images 0..num - 1."""
        return [chunk for chunk in range(num_chunks(num)) if self._count(chunk) < chunk_size(chunk, num)]

    def write(self, chunk: int, samples: SampleChunk) -> None:
        """Add a chunk, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {_FEATURES + space: rows for space, rows in samples.features.items()}
        arrays |= {"images": samples.images, "labels": samples.labels, "token_ids": samples.token_ids.astype(np.int32)}
        settings = np.array(_json(self.settings))
        write_whole(self.path(chunk), lambda file: np.savez(file, allow_pickle=False, settings=settings, **arrays))

    def read(self, num: int) -> Iterator[SampleChunk]:
        """Images 0..num - 1, chunk by chunk.

        Raises:
            UserError: some are missing.
        """
        absent = self.missing(num)
        if absent:
            raise UserError(f"{self.path(absent[0])} is missing. Run the evaluation again: it draws what is not there.")
        return (read_chunk(self.path(chunk)).first(chunk_size(chunk, num)) for chunk in range(num_chunks(num)))

    def features(self, num: int) -> dict[str, Float[np.ndarray, "n _"]]:
        """Features of images 0..num - 1 by space; the images themselves are not read."""
        absent = self.missing(num)
        if absent:
            raise UserError(f"{self.path(absent[0])} is missing. Run the evaluation again: it draws what is not there.")
        found: dict[str, np.ndarray] = {}
        for chunk in range(num_chunks(num)):
            with _opened(self.path(chunk)) as archive:
                for name in archive.files:
                    if name.startswith(_FEATURES):
                        rows = archive[name][: chunk_size(chunk, num)]
                        # filled chunk by chunk: parts that are put together at the end would be there twice
                        whole = found.setdefault(name, np.empty((num, rows.shape[1]), rows.dtype))
                        whole[chunk * CHUNK : chunk * CHUNK + len(rows)] = rows
        return {name.removeprefix(_FEATURES): rows for name, rows in found.items()}

    def _count(self, chunk: int) -> int:
        """Images in a chunk; 0 where it is not there or damaged."""
        try:
            with _opened(self.path(chunk)) as archive:
                return len(archive["labels"])
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return 0

    def _check(self, path: Path) -> None:
        if path.suffix == ".partial":
            return  # left by a process that was killed while it wrote
        try:
            with _opened(path) as archive:
                theirs = json.loads(str(archive["settings"]))
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read (%s); it is drawn again.", path, " ".join(str(error).split()))
            return
        changed = [name for name in {**self.settings, **theirs} if not _same(self.settings, theirs, name)]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self.folder} holds samples made with other settings ({', '.join(changed)} differ; {name}: "
                f"{_short(theirs.get(name))} there, {_short(self.settings.get(name))} asked for). "
                "Choose another --out; nothing is overwritten."
            )


def num_chunks(num: int) -> int:
    """Chunks that `num` images fill, the last maybe in part."""
    return -(-num // CHUNK)


def chunk_size(chunk: int, num: int) -> int:
    """How many of `num` images lie in a chunk."""
    return min(CHUNK, num - chunk * CHUNK)


def chunk_number(path: Path) -> int | None:
    """Number of the chunk in a file of this name; None for other files.

    >>> chunk_number(Path("samples/chunk_00012.npz")), chunk_number(Path("grid.png"))
    (12, None)
    """
    digits = path.stem.removeprefix("chunk_")
    return int(digits) if path.suffix == ".npz" and path.stem.startswith("chunk_") and digits.isdecimal() else None


def labels_and_names(path: Path) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
    """Class ids of the images in a chunk, and the model's names of its classes by id; empty where it has none.

    Raises:
        OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile: the file is no whole chunk.
    """
    with _opened(path) as archive:
        settings = json.loads(str(archive["settings"]))
        return archive["labels"], tuple(settings.get("class_names", ()))


def read_chunk(path: Path) -> SampleChunk:
    """One file of a `ChunkStore`."""
    with _opened(path) as archive:
        features = {name.removeprefix(_FEATURES): archive[name] for name in archive.files if name.startswith(_FEATURES)}
        return SampleChunk(archive["images"], archive["labels"], archive["token_ids"], features)


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    # opened here: np.load leaves a broken archive open
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        yield archive


def _is_ours(path: Path) -> bool:
    return path.name.startswith(("chunk_", ".chunk_")) and path.suffix in (".npz", ".partial")


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> bool:
    return _json(ours.get(name)) == _json(theirs.get(name))


def _short(value: Any) -> str:
    text = _json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
