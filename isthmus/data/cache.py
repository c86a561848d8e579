"""The user's cache folder, and files that appear there whole or not at all."""

import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from isthmus.errors import UserError

logger = logging.getLogger("isthmus")


def cache_directory(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder for things that can be made again, created where it is missing.

    `cache_dir` wins over the variable ISTHMUS_CACHE, which wins over the platform's place (~/.cache/isthmus on Linux).
    Where that is nowhere, as in containers whose user has no home, it is a folder of the user's among the temporary
    files. Raises UserError where the folder cannot be written.
    """
    asked = cache_dir or os.environ.get("ISTHMUS_CACHE")
    # unlike Path.expanduser, this leaves a "~" alone that stands for nothing
    chosen = Path(os.path.expanduser(asked)) if asked else _own_cache()
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=chosen):
            return chosen
    except OSError as error:
        raise UserError(
            f"The cache folder must be writable, got {chosen} ({error.strerror}). "
            "Point the environment variable ISTHMUS_CACHE at a folder of yours."
        ) from error


def _own_cache() -> Path:
    import platformdirs

    # relative, or an error, where the system knows no home of this user
    with suppress(RuntimeError):
        folder = platformdirs.user_cache_path("isthmus", appauthor=False)
        above = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
        if folder.is_absolute() and os.access(above, os.W_OK):
            return folder
    # nobody else can have filled it: it is made for this user alone, and one of another owner is not taken
    user = os.getuid() if hasattr(os, "getuid") else "user"
    fallback = Path(tempfile.gettempdir()) / f"isthmus-{user}"
    with suppress(FileExistsError):
        fallback.mkdir(mode=0o700)
    if hasattr(os, "getuid") and (fallback.is_symlink() or fallback.stat().st_uid != os.getuid()):
        raise UserError(
            f"The cache folder must be yours, got {fallback}, which is another user's. Point the environment variable "
            "ISTHMUS_CACHE at a folder of yours."
        )
    logger.info("no home folder to keep things in: using %s (ISTHMUS_CACHE names another)", fallback)
    return fallback


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
