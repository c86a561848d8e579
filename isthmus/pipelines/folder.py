"""A saved pipeline as files, here or on the hub: found, read and checked without importing torch."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from isthmus.errors import UserError
from isthmus.files import check_writable, contents
from isthmus.nn.component_files import CONFIG, read_json

FORMAT = 2
INDEX_NAME = "model_index.json"
FORGOTTEN = {
    "critic": "rounds in which it chose tokens choose them by the model's own probability (mode 'masked')",
}
"""Components that earlier versions saved and this one does not read, and what is done in their place."""


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a pipeline folder that this version can read; UserError for any other folder."""
    if not (folder / INDEX_NAME).is_file():
        if folder.is_dir():
            what = "has no model_index.json" if any(folder.iterdir()) else "is empty"
        else:
            what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"a model must be a pipeline folder, got {folder}, which {what}. Pass the folder of a saved model."
        )
    index = read_json(folder / INDEX_NAME)
    number = index.get("isthmus_format")
    if not isinstance(number, int) or number < 1:
        raise UserError(
            f"{folder} is no Isthmus pipeline: model_index.json has no isthmus_format. "
            "Convert published weights with `isthmus convert` first."
        )
    if number > FORMAT:
        raise UserError(
            f"{folder} has format {number} (of Isthmus {index.get('isthmus_version', '?')}), this version reads "
            f"up to {FORMAT}. Update Isthmus: pip install -U isthmus."
        )
    return index


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end; an error leaves nothing behind.

    An empty folder stays the one it is, and gets the files: a mounted volume, the folder a shell stands in and the end
    of a link cannot be replaced. Raises UserError where `folder` is neither new nor empty, or cannot be written.
    """
    check_writable(folder, "the output folder")
    # a link may lead to what does not exist yet
    folder = Path(os.path.realpath(folder))
    if contents(folder):
        raise UserError(f"the output folder must be new or empty, got {folder}. Choose another one or remove it.")
    if folder.exists():
        with replaced_within(folder) as temporary:
            yield temporary
        return
    temporary = folder.absolute().parent / f".{folder.name}.{uuid4().hex[:8]}.partial"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_within(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`; at the end its entries take the place of those of the same name."""
    temporary = folder / f".{uuid4().hex[:8]}.partial"
    temporary.mkdir()
    try:
        yield temporary
        # last what makes the folder a model: the index, or the configuration of a single component
        for new in sorted(temporary.iterdir(), key=lambda path: path.name in (INDEX_NAME, CONFIG)):
            old = folder / new.name
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            new.replace(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_folder(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: the path itself where it exists, else the hub's files, downloaded or from the cache.

    Raises UserError where neither exists; offline and not cached is one error.
    """
    path = Path(os.path.expanduser(path_or_hub_id))
    if path.exists():
        return path
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise UserError(
            f"a model must be a pipeline folder or a hub id (owner/name), got {name}, which does not exist."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "README.md"]
    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, allow_patterns=files
        )
    except (HfHubHTTPError, HFValidationError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the hub has no {name} for us ({first}). Check the name, the revision and your login."
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is no folder here, not in the hub's cache, and the hub cannot be asked ({type(error).__name__}). "
            "Pass an existing folder, or go online once to download it."
        ) from error
    return Path(folder)
