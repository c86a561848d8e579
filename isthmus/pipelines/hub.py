"""Where a model's files are: a folder here, or the hub's files through its cache. Imports no torch."""

import os
import re
from pathlib import Path

from isthmus.errors import UserError


def model_folder(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: the path itself where it exists, else the hub's files, downloaded or from the cache.

    Raises:
        UserError: neither exists; offline and not cached is one error.
    """
    path = Path(os.path.expanduser(path_or_hub_id))
    if path.exists():
        return path
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise UserError(
            f"a model must be a pipeline folder or a hub id (owner/name), got {name}, which does not exist."
        )
    return _hub_folder(name, revision, cache_dir, local_files_only)


def _hub_folder(name: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", "README.md"],
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
