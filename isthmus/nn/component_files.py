"""The files of one component, config.json and safetensors, read and checked without importing torch."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from isthmus.errors import UserError
from isthmus.files import cache_directory, sha256_of_parts, write_whole

CONFIG = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"

# bytes; reading fewer takes no longer than looking something up
_WORTH_REMEMBERING = 2**24


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError where it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be JSON, but cannot be read ({error}). Copy or download it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(values).__name__}. Copy or download it again.")
    return values


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """`config.json` (or the file `name`) of a component's folder; UserError where it is missing, or no JSON object."""
    if not (folder / name).is_file():
        raise UserError(f"a saved model needs {folder / name}, which is missing. Copy or download it whole.")
    return read_json(folder / name)


def weight_files(folder: Path, weights: str = DIFFUSERS_WEIGHTS) -> list[Path]:
    """The safetensors files of a component: one, or all shards that its listing names; UserError if one is missing."""
    files, listing = [folder / weights], folder / f"{weights}.index.json"
    if listing.is_file():
        files = [folder / name for name in sorted(set(read_json(listing)["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"a saved model needs {file}, which is missing. Copy or download it whole.")
    return files


def remembered(what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, a short text about what is in files; of large files it is kept in the cache folder, if it can be.

    It is computed anew where a file has another place, size or time of change. `what` names it.
    """
    stats = {file.resolve(): file.stat() for file in files}
    if sum(stat.st_size for stat in stats.values()) < _WORTH_REMEMBERING:
        return compute()
    facts = [(file, stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()]
    try:
        folder = cache_directory() / "weights"
        folder.mkdir(exist_ok=True)
    except (UserError, OSError):
        return compute()
    note = folder / sha256_of_parts(what, *facts)
    with suppress(OSError):
        # an empty one was cut short by a power cut
        if text := note.read_text(encoding="utf-8"):
            return text
    text = compute()
    with suppress(UserError):
        write_whole(note, text, flush=False)
    return text


def stored_shapes(folder: Path, weights: str = DIFFUSERS_WEIGHTS) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight, from the headers of all shards; UserError for missing, cut or other files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in weight_files(folder, weights):
        try:
            shapes |= _shapes_in_header(shard)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{shard} is truncated or no safetensors file ({error}). Copy or download it again."
            ) from error
    return shapes


def _shapes_in_header(file: Path) -> dict[str, tuple[int, ...]]:
    """What a safetensors file says of itself: eight bytes of length, then JSON. safetensors would import numpy."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > size:
            raise ValueError("its header is longer than the file")
        header = json.loads(opened.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, and its header tells of {8 + length + end}")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}
