"""What takes long to make is made by one process of a test run, and read by all."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

Made = TypeVar("Made")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What `make` returns for an empty folder; the processes that come later wait, and get the same.

    A fixture that lives for a session is made once per process otherwise. Whoever changes files must copy them.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / name
    record = folder / "made.pickle"
    with FileLock(f"{folder}.lock"):
        if not record.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            record.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(record.read_bytes())
