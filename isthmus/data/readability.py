"""Every image is decoded once before training, so that a broken file is found at the start and not in the middle."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from isthmus.data.cache import write_whole
from isthmus.data.decode import UnreadableImage, decode_image
from isthmus.data.workers import usable_processors
from isthmus.display import Display

_CHUNK = 512


@dataclass(frozen=True)
class Finding:
    """What decoding an image showed: its content hash (sha256, hex), and why it cannot be used ("" = it can)."""

    digest: str
    reason: str


def examine(keys: Sequence[str], read: Callable[[int], bytes], *, index_file: Path, what: str) -> list[Finding]:
    """Decode image i from `read(i)` for every key, in threads; what was readable is remembered in `index_file`.

    `keys` name contents: a key that changes with the file (its size and time) is examined again. Images that were
    broken are examined at every start, since they may have been mended in place. Interrupted work is kept.
    """
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
            write_whole(index_file, lambda file: file.write(json.dumps(readable).encode()))
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
