"""Images as token ids on disk: a frozen tokenizer runs once, the prior reads integers."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor, nn
from torch.utils.data import Dataset

from isthmus.data.huggingface import ImageStream
from isthmus.data.images import Augmentation, augmented_view
from isthmus.data.source import ImageSource, logger
from isthmus.data.views import Batch, Sample, collate, random_views, worker_batches
from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import contents, sha256_of_parts, waited_for, writing_advice
from isthmus.nn.draws import AUGMENT, stream
from isthmus.nn.stored_llama import fingerprint

FORMAT = 1
_TOKENS, _LABELS, _RECORD = "tokens.npy", "labels.npy", "cache.json"


@runtime_checkable
class ImageTokenizer(Protocol):
    """A network that turns images in [-1, 1] into `token_ids`: integers (B, length), or a list of such parts."""

    @property
    def config(self) -> Any:
        """Holds `codebook_size`."""
        ...

    def encode(self, images: Tensor) -> Any:
        """Images (B, 3, S, S) to an output with `token_ids`."""
        ...


class TokenCache:
    """A folder of token ids, read through a memory map: no RAM is needed, whatever its size.

    Row i * num_views + v of `token_ids` (uint16; int32 for more than 65536 codes) is view v of image i. `fingerprint`
    is a sha256 (hex) over tokenizer, images and settings.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the folder without asking for the tokenizer: `open` and `build` do. UserError where it is damaged."""
        self.path = Path(path)
        self.record = _read_record(self.path)
        self.num_views = int(self.record["num_views"])
        self.class_names = tuple(self.record["class_names"])
        self.fingerprint = str(self.record["fingerprint"])
        self._map()

    def _map(self) -> None:
        try:
            # Without the asarray every batch would be a memmap object, too.
            self.token_ids: Integer[np.ndarray, "rows l"] = np.asarray(np.load(self.path / _TOKENS, mmap_mode="r"))
            self.labels: Integer[np.ndarray, " n"] = np.load(self.path / _LABELS)
            whole = len(self.token_ids) == len(self.labels) * self.num_views == self.record["rows"]
        except PermissionError as error:
            raise UserError(
                f"The token cache {self.path} must be readable ({error}). Check its permissions."
            ) from error
        except (OSError, ValueError, EOFError):
            whole = False
        if not whole:
            raise UserError(f"The token cache {self.path} is damaged. Delete it, and it is made again.")

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.labels)

    @classmethod
    def open(cls, path: str | Path, tokenizer: ImageTokenizer) -> "TokenCache":
        """The cache at `path`. UserError where it is absent, damaged or was made by another tokenizer."""
        cache = cls(path)
        _refuse_other(cache, {"tokenizer": fingerprint(cast(nn.Module, tokenizer))})
        return cache

    @classmethod
    def build(
        cls,
        path: str | Path,
        tokenizer: ImageTokenizer,
        source: ImageSource | ImageStream,
        *,
        image_size: int,
        seed: int,
        num_views: int = 1,
        augment: Augmentation | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        max_images: int | None = None,
    ) -> "TokenCache":
        """Encode every image `num_views` times and write the result at `path`, or open it where that was done before.

        The folder appears whole or not at all; one process builds at a time. `augment` None is the source's own;
        view v of image i depends on (seed, i * num_views + v). `max_images` ends early, and is needed for a stream.
        UserError where `path` holds a cache of another tokenizer, other images or other settings, and on a full disk.
        """
        path = Path(path)
        if num_views < 1 or (max_images is not None and max_images < 1):
            raise UserError(
                f"A cache needs at least one image and one view, got {max_images} images and {num_views} views."
            )
        if isinstance(source, ImageStream) and max_images is None:
            raise UserError(f"{source.name} is a stream without an end. Say how many images to keep (max_images).")
        augment = augment or source.augmentation
        made_from = {
            "tokenizer": fingerprint(cast(nn.Module, tokenizer)),
            "data": source.fingerprint,
            "settings": {
                "num_views": num_views,
                "image_size": image_size,
                "augment": asdict(augment),
                "seed": seed,
                "max_images": max_images,
            },
        }
        # a finished one may lie where nothing can be written
        if not contents(path):
            with waited_for(path, "the token cache"):
                if not contents(path):
                    views, rows = _views(
                        source, image_size, augment, seed, num_views, batch_size, num_workers, max_images
                    )
                    _make(path, tokenizer, source, views, made_from, device, num_views, rows)
                    return cls(path)
        cache = cls(path)
        _refuse_other(cache, made_from)
        logger.info("token cache: using %s", path)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes map the file again: a pickled map would be a copy of it."""
        return {key: value for key, value in vars(self).items() if key not in ("token_ids", "labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See __getstate__."""
        vars(self).update(state)
        self._map()


class CacheViews(Dataset[Sample]):
    """The views that a cache encodes, by row: view `row % num_views` of image `row // num_views`."""

    def __init__(self, source: ImageSource, image_size: int, augment: Augmentation, seed: int, num_views: int) -> None:
        self.source, self.image_size, self.augment = source, image_size, augment
        self.seed, self.num_views = seed, num_views

    def __getitem__(self, row: int) -> Sample:
        return {name: rows[0] for name, rows in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        numbers = np.asarray(rows, dtype=np.int64)
        return random_views(self.source, numbers // self.num_views, numbers, self.image_size, self.augment, self.seed)


def _make(
    path: Path,
    tokenizer: ImageTokenizer,
    source: ImageSource | ImageStream,
    views: Iterator[Batch],
    made_from: dict[str, Any],
    device: torch.device | str,
    num_views: int,
    rows: int | None,
) -> None:
    """Write a cache; UserError on a full disk, and where no image could be read."""
    # an empty folder stays the one it is: a mounted volume cannot be replaced
    given = path.is_dir()
    partial = path / ".partial" if given else path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    start = time.perf_counter()
    try:
        partial.mkdir(parents=True)
        labels, length, written = _encode(partial / _TOKENS, tokenizer, views, device, rows)
        labels = labels[::num_views]
        if not written:
            raise UserError(f"{source.name}: no image could be read. Check the data set.")
        _write(partial / _LABELS, lambda file: np.save(file, labels))
        record = {
            "format": FORMAT,
            "fingerprint": sha256_of_parts(json.dumps(made_from, sort_keys=True)),
            "made_from": made_from,
            "source": source.name,
            "class_names": list(source.class_names),
            "num_views": num_views,
            "rows": written,
        }
        _write(partial / _RECORD, lambda file: file.write(json.dumps(record, indent=2).encode()))
        if given:
            for name in (_TOKENS, _LABELS, _RECORD):
                (partial / name).rename(path / name)
        else:
            partial.rename(path)
    except OSError as error:
        raise UserError(
            f"Could not write the token cache {path}: {error.strerror or error}. {writing_advice(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size, seconds = (path / _TOKENS).stat().st_size, time.perf_counter() - start
    logger.info(
        "token cache: %d images x %d views x %d tokens, %.1f MB, %.1f s (%.0f images/s) in %s",
        *(len(labels), num_views, length, size / 1e6, seconds, written / seconds, path),
    )


def _views(
    source: ImageSource | ImageStream,
    image_size: int,
    augment: Augmentation,
    seed: int,
    num_views: int,
    batch_size: int,
    num_workers: int,
    max_images: int | None,
) -> tuple[Iterator[Batch], int | None]:
    """Batches of views in the order of the cache's rows, and the number of these (None: of a stream nobody knows)."""
    if isinstance(source, ImageStream):
        assert max_images is not None, "checked by build"
        return _streamed_views(source, image_size, augment, seed, num_views, batch_size, max_images), None
    dataset = CacheViews(source, image_size, augment, seed, num_views)
    rows = min(len(source), max_images or len(source)) * num_views
    slices = (list(range(first, min(first + batch_size, rows))) for first in range(0, rows, batch_size))
    if num_workers:
        return worker_batches(dataset, slices, num_workers), rows
    return (dataset.__getitems__(chosen) for chosen in slices), rows


def _streamed_views(
    source: ImageStream,
    image_size: int,
    augment: Augmentation,
    seed: int,
    num_views: int,
    batch_size: int,
    max_images: int,
) -> Iterator[Batch]:
    made = (
        (
            augmented_view(image, image_size, augment, stream(seed, AUGMENT, row), may_flip=bool(source.flip[label])),
            label,
        )
        for index, (image, label) in enumerate(islice(source.images(), max_images))
        for row in range(index * num_views, (index + 1) * num_views)
    )
    start, whole_images = 0, -(-batch_size // num_views) * num_views
    while batch := list(islice(made, whole_images)):
        views, labels = zip(*batch, strict=True)
        rows = np.arange(start, start + len(views))
        yield collate(views, np.array(labels), rows // num_views, rows)
        start += len(views)


@torch.no_grad()
def _encode(
    file_path: Path, tokenizer: ImageTokenizer, views: Iterator[Batch], device: torch.device | str, rows: int | None
) -> tuple[Integer[np.ndarray, " rows"], int, int]:
    """Write tokens.npy row by row; the labels of the rows, tokens per row and the number of rows."""
    network = cast(nn.Module, tokenizer)
    kind = np.dtype("<u2" if tokenizer.config.codebook_size <= 2**16 else "<i4")
    labels: list[np.ndarray] = []
    written, length = 0, 0
    was_training = network.training
    network.eval()
    try:
        with file_path.open("wb") as file, Display("encoding images", rows, "view") as bar:
            # of one length whatever its shape, which is filled in at the end
            header = {"descr": kind.str, "fortran_order": False, "shape": (0, 0)}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in views:
                token_ids = tokenizer.encode(batch["image"].to(device)).token_ids
                if not isinstance(token_ids, Tensor):
                    token_ids = torch.cat(list(token_ids), dim=1)
                file.write(token_ids.cpu().numpy().astype(kind).tobytes())
                labels.append(batch["class_label"].numpy())
                written, length = written + len(token_ids), token_ids.shape[1]
                bar.update(len(token_ids))
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header | {"shape": (written, length)})
            file.flush()
            os.fsync(file.fileno())
    finally:
        network.train(was_training)
    return np.concatenate([np.zeros(0, dtype=np.int64), *labels]), length, written


def _write(path: Path, write: Any) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"A token cache is a folder, got {path}, which does not exist. Build it first.")
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        if record["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer Isthmus (format {record['format']}). Update Isthmus.")
        return record
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"The token cache {path} must be readable ({error}). Check its permissions.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no token cache that can be read. Delete it, and it is made again.") from error


def _refuse_other(cache: TokenCache, made_from: dict[str, Any]) -> None:
    """UserError unless the cache was made from this tokenizer, these images and these settings."""
    words = {"tokenizer": "another tokenizer", "data": "other images", "settings": "other settings"}
    before = cache.record["made_from"]
    for part, wanted in made_from.items():
        if before[part] == wanted:
            continue
        detail = ""
        if isinstance(wanted, dict):
            changed = [
                f"{key}: {before[part].get(key)}, now {wanted[key]}"
                for key in wanted
                if before[part].get(key) != wanted[key]
            ]
            detail = f" ({'; '.join(changed)})"
        raise UserError(
            f"The token cache {cache.path} was made with {words[part]}{detail}. Delete it, or choose another folder."
        )
