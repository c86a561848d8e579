"""The user's cache folder, and files that appear there whole or not at all."""

import errno
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from isthmus.errors import UserError


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for things that can be made again, created where it is missing.

    `cache_dir` wins over the variable ISTHMUS_CACHE, which wins over the platform's place (~/.cache/isthmus on Linux).
    Raises UserError where the folder cannot be written.
    """
    chosen = Path(cache_dir or os.environ.get("ISTHMUS_CACHE") or _platform_cache()).expanduser()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            return chosen
    except OSError as error:
        raise UserError(
            f"The cache folder must be writable, got {chosen} ({error.strerror}). "
            "Point the environment variable ISTHMUS_CACHE at a folder of yours."
        ) from error


def _platform_cache() -> Path:
    if platform.system() == "Windows":
        return Path(os.environ.get("LOCALAPPDATA", "~")).expanduser() / "isthmus" / "cache"
    if platform.system() == "Darwin":
        return Path("~/Library/Caches/isthmus").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "isthmus"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it: readers see all of it or none.

    Raises UserError where the disk is full or the folder cannot be written; nothing is left behind.
    """
    # not a name of tempfile's: those files are for their owner alone, and so would the result be
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Could not write {path}: {error.strerror or error}. {writing_advice(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def writing_advice(error: OSError) -> str:
    """What to do where a file could not be written.

    >>> writing_advice(OSError(errno.ENOSPC, "No space left on device"))
    'Free some space, or choose another folder.'
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free some space, or choose another folder."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a folder that you may write to."
    return "Check the folder, or choose another."


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_parts(*parts: object) -> str:
    """Hex digest of the parts' texts; the parts cannot run into each other."""
    digest = hashlib.sha256()
    for part in parts:
        text = str(part).encode("utf-8", "surrogateescape")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()
