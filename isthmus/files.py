"""The folder that a command writes: new, empty or its own, writable, and nobody else's while the command runs."""

import errno
import inspect
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, ParamSpec, TypeVar

from isthmus.errors import UserError

logger = logging.getLogger("isthmus")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LOCK = ".lock"
# an empty disk has the first, a folder in use the second, and the third is left by who was killed while writing
_NOT_CONTENTS = ("lost+found", _LOCK, ".partial")
# what a file system without locks says
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

# real paths of the folders that a thread has claimed
_own = threading.local()


def contents(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where it is missing, or an empty disk."""
    return sorted(path for path in folder.iterdir() if path.name not in _NOT_CONTENTS) if folder.exists() else []


def check_writable(folder: Path, what: str = "--out") -> None:
    """Try to write where `folder` is or will be: before the work, not after it.

    Raises:
        UserError: it cannot be made there, or nothing can be written into it.
    """
    # a link may lead to what does not exist yet
    real = Path(os.path.realpath(folder))
    place = next(path for path in (real, *real.parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{what} must be a folder, got {folder}, where {place} is a file. Choose another name.")
    try:
        with TemporaryFile(dir=place):
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
    folder where nothing has come to lie in it.

    Raises:
        UserError: somebody else is at work there, or nothing can be written there.
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
    file = _locked(real / _LOCK)
    if isinstance(file, str):
        raise UserError(
            f"one process works in a folder at a time, and {file} is at work in {folder}. Wait for it, end it, or "
            "choose another --out; several processes of one run are started by torchrun."
        )
    try:
        with _until_done(file, real / _LOCK):
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
    """One process at a time makes the folder `path`: others wait here until it is done, or its process has ended.

    Raises:
        UserError: nothing can be written there.
    """
    check_writable(path, what)
    real = Path(os.path.realpath(path))
    lock = real / _LOCK if real.is_dir() else real.with_name(f".{real.name}{_LOCK}")
    lock.parent.mkdir(parents=True, exist_ok=True)
    file, said = _locked(lock), False
    while isinstance(file, str):
        if not said:
            logger.info("waiting for %s, which makes %s %s", file, what, path)
        said = True
        time.sleep(0.5)
        file = _locked(lock)
    with _until_done(file, lock):
        yield


def _locked(path: Path) -> IO[str] | str:
    """The lock's file, open and locked; or, where another process holds it, which one."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        if not _lock(file):
            with file:
                file.seek(0)
                return file.read(200).strip() or "another process"
        # whoever had it before may have deleted the file after we opened it
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()


@contextmanager
def _until_done(file: IO[str], path: Path) -> Iterator[None]:
    with file:
        try:
            yield
        finally:
            # Windows deletes no open files: there it stays, and means nothing
            with suppress(OSError):
                path.unlink()


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
