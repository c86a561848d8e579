"""Images as token ids on disk: a frozen tokenizer runs once, the prior reads integers."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor, nn

from isthmus.data.huggingface import StreamedImages
from isthmus.data.images import Augmentation
from isthmus.data.source import ImageSource, ImageStream, StreamedImage, logger
from isthmus.data.views import Batch, BatchedDataset, random_views, worker_batches
from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import contents, sha256_of_parts, waited_for, write_flushed, writing_advice
from isthmus.nn.stored_llama import fingerprint

FORMAT = 1
_TOKENS, _LABELS, _CAPTIONS, _RECORD = "tokens.npy", "labels.npy", "captions.json", "cache.json"


class TokenCache:
    """A folder of token ids, read through a memory map: no RAM is needed, whatever its size.

    Row i * num_views + v of `token_ids` (uint16; int32 for more than 65536 codes) is view v of image i, whose caption
    is `captions[i]` (None: the images have no captions). `fingerprint` is a sha256 (hex) over tokenizer, images and
    settings.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the folder without asking for the tokenizer: `open` and `build` do. UserError where it is damaged."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"a token cache is a folder, got {path}, which does not exist. Build it first.")
        try:
            self.record = json.loads((self.path / _RECORD).read_text(encoding="utf-8"))
            if self.record["format"] > FORMAT:
                raise UserError(f"{path} is of a newer Isthmus (format {self.record['format']}). Update Isthmus.")
            self.num_views = int(self.record["num_views"])
            self.class_names = tuple(self.record["class_names"])
            self.fingerprint = str(self.record["fingerprint"])
            self._map()
            whole = len(self.token_ids) == len(self.labels) * self.num_views == self.record["rows"]
            whole &= self.captions is None or len(self.captions) == len(self.labels)
        except UserError:
            raise
        except PermissionError as error:
            raise UserError(f"the token cache {path} must be readable ({error}). Check its permissions.") from error
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            whole = False
        if not whole:
            raise UserError(f"{path} holds no token cache that is whole. Delete it, and it is made again.")

    def _map(self) -> None:
        # Without the asarray every batch would be a memmap object, too.
        self.token_ids: Integer[np.ndarray, "rows l"] = np.asarray(np.load(self.path / _TOKENS, mmap_mode="r"))
        self.labels: Integer[np.ndarray, " n"] = np.load(self.path / _LABELS)
        self.captions: list[str] | None = None
        if self.record.get("has_captions"):
            self.captions = json.loads((self.path / _CAPTIONS).read_text(encoding="utf-8"))

    @classmethod
    def open(cls, path: str | Path, tokenizer: nn.Module) -> "TokenCache":
        """The cache at `path`. UserError where it is absent, damaged or was made by another tokenizer."""
        cache = cls(path)
        _refuse_other(cache, {"tokenizer": fingerprint(tokenizer)})
        return cache

    @classmethod
    def build(
        cls,
        path: str | Path,
        tokenizer: nn.Module,
        source: ImageSource | ImageStream,
        *,
        image_size: int,
        seed: int,
        num_views: int = 1,
        augment: Augmentation | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        num_workers: int | None = 0,
        max_images: int | None = None,
    ) -> "TokenCache":
        """Encode every image `num_views` times and write the result at `path`, or open it where that was done before.

        The tokenizer has `config.codebook_size`, and `encode` for images in [-1, 1], whose output has `token_ids`:
        integers (B, length), or a list of such parts. The folder appears whole or not at all; one process builds at a
        time. `augment` None is the source's own; view v of image i depends on (seed, i * num_views + v). `max_images`
        ends early, and is needed for a stream. UserError where `path` holds a cache of another tokenizer, other images
        or other settings, and on a full disk.
        """
        path = Path(path)
        if num_views < 1 or (max_images is not None and max_images < 1):
            raise UserError(
                f"a cache needs at least one image and one view, got {max_images} images and {num_views} views."
            )
        if isinstance(source, ImageStream) and max_images is None:
            raise UserError(f"{source.name} is a stream without an end. Say how many images to keep (max_images).")
        if not isinstance(source, ImageStream) and not len(source):
            raise UserError(f"{source.name} has no image to encode. Check the data set.")
        settings = {
            "num_views": num_views,
            "image_size": image_size,
            "augment": augment or source.augmentation,
            "seed": seed,
        }
        made_from = {
            "tokenizer": fingerprint(tokenizer),
            "data": source.fingerprint,
            "settings": settings | {"augment": asdict(settings["augment"]), "max_images": max_images},
        }
        # a finished one may lie where nothing can be written
        if not contents(path):
            with waited_for(path, "the token cache"):
                if not contents(path):
                    if isinstance(source, ImageStream):
                        rows, captions = None, [] if source.has_captions else None
                        images = _noting(islice(source.images(), max_images), captions)
                        views = _streamed_views(source, images, batch_size, settings)
                    else:
                        number = min(len(source), max_images or len(source))
                        rows, numbers = number * num_views, iter(range(number * num_views))
                        captions = None if source.captions is None else list(source.captions[:number])
                        slices = iter(lambda: list(islice(numbers, batch_size)), [])
                        views = worker_batches(CacheViews(source, **settings), slices, num_workers)
                    _make(path, tokenizer, source, views, rows, captions, made_from, device)
                    return cls(path)
        cache = cls(path)
        _refuse_other(cache, made_from)
        logger.info("token cache: using %s", path)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes map the file again: a pickled map would be a copy of it."""
        return {key: value for key, value in vars(self).items() if key not in ("token_ids", "labels", "captions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See __getstate__."""
        vars(self).update(state)
        self._map()


@dataclass(eq=False)
class CacheViews(BatchedDataset):
    """The views that a cache encodes, by row: view `row % num_views` of image `row // num_views`.

    `first_image` is the number of the first image of `source` where that is a part of a stream.
    """

    source: ImageSource
    image_size: int
    augment: Augmentation
    seed: int
    num_views: int
    first_image: int = 0

    def __post_init__(self) -> None:
        self.in_memory = self.source.in_memory

    def batch(self, rows: Sequence[int]) -> Batch:
        """See `BatchedDataset`."""
        numbers = np.asarray(rows, dtype=np.int64)
        indices = numbers // self.num_views - self.first_image
        return random_views(self.source, indices, numbers, self.image_size, self.augment, self.seed)


def _noting(images: Iterator[StreamedImage], captions: list[str] | None) -> Iterator[StreamedImage]:
    """The images, whose captions are added to `captions` as they go by."""
    for one in images:
        if captions is not None:
            captions.append(one.caption)
        yield one


def _streamed_views(
    source: ImageStream, images: Iterator[StreamedImage], batch_size: int, settings: dict[str, Any]
) -> Iterator[Batch]:
    num_views = settings["num_views"]
    at_once = -(-batch_size // num_views)
    for first in count(0, at_once):
        # image by image: whole images of a batch can take gigabytes
        parts = [
            CacheViews(StreamedImages(source, [image]), **settings, first_image=number).batch(
                range(number * num_views, (number + 1) * num_views)
            )
            for number, image in enumerate(islice(images, at_once), first)
        ]
        if not parts:
            return
        yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _make(
    path: Path,
    tokenizer: nn.Module,
    source: ImageSource | ImageStream,
    views: Iterator[Batch],
    rows: int | None,
    captions: list[str] | None,
    made_from: dict[str, Any],
    device: torch.device | str,
) -> None:
    """Write a cache of `rows` views (None: nobody knows); UserError on a full disk.

    `captions` are complete when all views were read; None where the images have none.
    """
    # an empty folder stays the one it is: a mounted volume cannot be replaced
    given = path.is_dir()
    partial = path / ".partial" if given else path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    start, num_views = time.perf_counter(), made_from["settings"]["num_views"]
    try:
        partial.mkdir(parents=True)
        labels, (written, length) = _encode(partial / _TOKENS, tokenizer, views, device, rows)
        labels = labels[::num_views]
        write_flushed(partial / _LABELS, lambda file: np.save(file, labels))
        names, told = [_TOKENS, _LABELS], {}
        if captions is not None:
            # an earlier version passes it by
            write_flushed(partial / _CAPTIONS, json.dumps(captions, ensure_ascii=False))
            names, told = [*names, _CAPTIONS], {"has_captions": True}
        record = {
            "format": FORMAT,
            "fingerprint": sha256_of_parts(json.dumps(made_from, sort_keys=True)),
            "made_from": made_from,
            "source": source.name,
            "class_names": list(source.class_names),
            "num_views": num_views,
            "rows": written,
            **told,
        }
        write_flushed(partial / _RECORD, json.dumps(record, indent=2))
        if given:
            for name in (*names, _RECORD):
                (partial / name).rename(path / name)
        else:
            partial.rename(path)
    except OSError as error:
        raise UserError(
            f"could not write the token cache {path}: {error.strerror or error}. {writing_advice(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size, seconds = (path / _TOKENS).stat().st_size, time.perf_counter() - start
    logger.info(
        "token cache: %d images x %d views x %d tokens, %.1f MB, %.1f s (%.0f images/s) in %s",
        *(len(labels), num_views, length, size / 1e6, seconds, written / seconds, path),
    )


@torch.no_grad()
def _encode(
    file_path: Path, tokenizer: Any, views: Iterator[Batch], device: torch.device | str, rows: int | None
) -> tuple[Integer[np.ndarray, " rows"], tuple[int, int]]:
    """Write tokens.npy batch by batch; the labels of its rows, and its shape."""
    kind = np.dtype("<u2" if tokenizer.config.codebook_size <= 2**16 else "<i4")
    header = {"descr": kind.str, "fortran_order": False}
    labels: list[np.ndarray] = []
    shape = (0, 0)
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        with file_path.open("wb") as file, Display("encoding images", rows, "view") as bar:
            # of one length whatever its shape, which is filled in at the end
            np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
            for batch in views:
                token_ids = tokenizer.encode(batch["image"].to(device)).token_ids
                if not isinstance(token_ids, Tensor):
                    token_ids = torch.cat(list(token_ids), dim=1)
                file.write(token_ids.cpu().numpy().astype(kind).tobytes())
                labels.append(batch["class_label"].numpy())
                shape = (shape[0] + len(token_ids), token_ids.shape[1])
                bar.update(len(token_ids))
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
            file.flush()
            os.fsync(file.fileno())
    finally:
        tokenizer.train(was_training)
    return np.concatenate(labels), shape


def _refuse_other(cache: TokenCache, made_from: dict[str, Any]) -> None:
    """UserError unless the cache was made from this tokenizer, these images and these settings."""
    words = {"tokenizer": "another tokenizer", "data": "other images", "settings": "other settings"}
    for part, wanted in made_from.items():
        before = cache.record["made_from"][part]
        if before == wanted:
            continue
        detail = ""
        if isinstance(wanted, dict):
            changed = [f"{key}: {before.get(key)}, now {new}" for key, new in wanted.items() if before.get(key) != new]
            detail = f" ({'; '.join(changed)})"
        raise UserError(
            f"the token cache {cache.path} was made with {words[part]}{detail}. Delete it, or choose another folder."
        )
