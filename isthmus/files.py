"""Files and folders: written whole or not at all, claimed by one process at a time, hashed, cached."""

import errno
import hashlib
import inspect
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import IO, BinaryIO, ParamSpec, TypeVar
from uuid import uuid4

from isthmus.errors import UserError

logger = logging.getLogger("isthmus")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LOCK = ".lock"
# an empty disk has the first, a folder in use the second
_NOT_CONTENTS = ("lost+found", _LOCK)
# what a file system without locks says
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

_CACHE = "Point the environment variable ISTHMUS_CACHE at a folder of yours."

# real paths of the folders that a thread has claimed
_own = threading.local()


def contents(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where it is missing, or an empty disk.

    Left out is what a process leaves that is killed while it writes: names that end in `.partial`.
    """
    present = folder.iterdir() if folder.exists() else ()
    return sorted(path for path in present if path.name not in _NOT_CONTENTS and not path.name.endswith(".partial"))


def check_only(folder: Path, what: str, *, ours: Collection[str] = ()) -> None:
    """Raise UserError where a folder that is not yet `what` holds anything but what is named in `ours`."""
    foreign = [path.name for path in contents(folder) if path.name not in ours]
    if foreign:
        raise UserError(
            f"--out must be new, empty or {what}, got {folder} with {foreign[0]} in it. Choose another folder."
        )


def check_writable(folder: Path, what: str = "--out") -> None:
    """Try to write where `folder` is or will be, before the work and not after it; UserError where that fails."""
    # a link may lead to what does not exist yet
    real = Path(os.path.realpath(folder))
    place = next(path for path in (real, *real.parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{what} must be a folder, got {folder}, where {place} is a file. Choose another name.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"{what} must be a folder that can be written, got {folder} ({place}: {error.strerror or error}). "
            "Choose another place, or mend its permissions."
        ) from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep others out of it meanwhile; the claims of one thread nest.

    The kernel holds the lock, so it ends with the process, however that ends. Nothing of it is left behind, nor the
    folder where it stays empty. Raises UserError where somebody else is at work there, or nothing can be written.
    """
    real = Path(os.path.realpath(folder))
    mine: set[Path] = _own.__dict__.setdefault("folders", set())
    if real in mine:
        yield
        return
    check_writable(folder)
    # outermost last: those that were made for this are taken away again where they stay empty
    made = [path for path in (real, *real.parents) if not path.exists()]
    real.mkdir(parents=True, exist_ok=True)

    def refuse(holder: str) -> None:
        raise UserError(
            f"one process works in a folder at a time, and {holder} is at work in {folder}. Wait for it, end it, or "
            "choose another --out; several processes of one run are started by torchrun."
        )

    try:
        with _locked(real / _LOCK, refuse):
            mine.add(real)
            yield
    finally:
        mine.discard(real)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def alone_in(argument: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A decorator: the function claims the folder in this argument, such as "out" or "run.out", and then works.

    Of the processes that a launcher started for one work, the first one claims.
    """

    def decorate(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature, (name, *fields) = inspect.signature(work), argument.split(".")

        @wraps(work)
        def claiming(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            folder = signature.bind(*args, **kwargs).arguments[name]
            for field in fields:
                folder = getattr(folder, field)
            with claimed(Path(folder)) if os.environ.get("RANK", "0") in ("", "0") else nullcontext():
                return work(*args, **kwargs)

        return claiming

    return decorate


@contextmanager
def waited_for(path: Path, what: str) -> Iterator[None]:
    """One process at a time makes the folder `path`: others wait here until it is done, or its process has ended."""
    check_writable(path, what)
    real = Path(os.path.realpath(path))
    lock = real / _LOCK if real.is_dir() else real.with_name(f".{real.name}{_LOCK}")
    lock.parent.mkdir(parents=True, exist_ok=True)
    told = False

    def wait(holder: str) -> None:
        nonlocal told
        if not told:
            logger.info("waiting for %s, which makes %s %s", holder, what, path)
        told = True
        time.sleep(0.5)

    with _locked(lock, wait):
        yield


@contextmanager
def _locked(path: Path, wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock in this file; as long as another process has it, `wait` is told which, again and again."""
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            if not _lock(file):
                file.seek(0)
                wait(file.read(200).strip() or "another process")
            # whoever had it before may have deleted the file after we opened it
            elif path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                try:
                    yield
                finally:
                    # Windows deletes no open files: there it stays, and means nothing
                    with suppress(OSError):
                        path.unlink()
                return


def _lock(file: IO[str]) -> bool:
    """Lock an open file, at once or not at all. The kernel lets go of it when the process ends, however it does."""
    try:
        if os.name == "nt":
            import msvcrt

            # far behind the text, which others may read then
            file.seek(2**20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            return False
        logger.info("%s lies on a file system without locks: start nothing else there", file.name)
    return True


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
        raise UserError(f"the cache folder must be writable, got {chosen} ({error.strerror}). {_CACHE}") from error


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
        raise UserError(f"the cache folder must be yours, got {fallback}, which is another user's. {_CACHE}")
    logger.info("no home folder to keep things in: using %s (ISTHMUS_CACHE names another)", fallback)
    return fallback


def write_flushed(path: Path, content: str | Callable[[BinaryIO], object], *, flush: bool = True) -> None:
    """Write a new file in a folder that is renamed when all of it is there; arguments as for `write_whole`.

    Raises OSError, for whoever knows the name that the file will have.
    """
    with open(path, "xb") as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            content(file)
        if flush:
            file.flush()
            os.fsync(file.fileno())


def write_whole(path: Path, content: str | Callable[[BinaryIO], object], *, flush: bool = True) -> None:
    """Write a file under a temporary name, then rename it: readers see all of it or none.

    `content` is a text, or writes into the open file. Flushed to the disk it also outlasts a power cut. Raises
    UserError where the disk is full or the folder cannot be written; nothing is left behind.
    """
    # not a name of tempfile's: those files are for their owner alone, and so would the result be
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        write_flushed(temporary, content, flush=flush)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}. {writing_advice(error)}") from error
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
