"""A saved pipeline as files: read and checked without importing torch, written whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open

from isthmus.errors import UserError

FORMAT = 1
INDEX_NAME = "model_index.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a pipeline folder that this version can read.

    Raises:
        UserError: the folder is missing, empty, no pipeline of ours, or of a newer format.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"a model must be a pipeline folder, got {folder}, which {what}. Pass the folder of a saved model."
        )
    if not (folder / INDEX_NAME).is_file():
        what = "has no model_index.json" if any(folder.iterdir()) else "is empty"
        raise UserError(
            f"a model must be a pipeline folder, got {folder}, which {what}. Pass the folder of a saved model."
        )
    index = _read_json(folder / INDEX_NAME)
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


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """`config.json` (or the file `name`) of a component's folder."""
    if not (folder / name).is_file():
        raise UserError(f"a saved model needs {folder / name}, which is missing. Copy or download it whole.")
    return _read_json(folder / name)


def stored_shapes(folder: Path, weights: str = DIFFUSERS_WEIGHTS) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored weight of a component, from the headers of its safetensors files (all shards).

    Args:
        folder: of the component.
        weights: name of the file, `TRANSFORMERS_WEIGHTS` for components of transformers.

    Raises:
        UserError: a file is missing, truncated, or holds something else.
    """
    shards = [folder / weights]
    listing = folder / f"{weights}.index.json"
    if listing.is_file():
        shards = [folder / name for name in sorted(set(_read_json(listing)["weight_map"].values()))]
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"a saved model needs {shard}, which is missing. Copy or download it whole.")
        try:
            with safe_open(shard, framework="np") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                f"{shard} is truncated or no safetensors file ({error}). Copy or download it again."
            ) from error
    return shapes


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end; an error leaves nothing behind.

    Raises:
        UserError: `folder` exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"the output folder must be new or empty, got {folder}. Choose another one or remove it.")
    temporary = folder.absolute().parent / f".{folder.name}.partial-{uuid4().hex[:8]}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replaced_within(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`; at the end its entries take the place of those of the same name."""
    temporary = folder / f".partial-{uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        # the index last: without it the folder is no model
        for new in sorted(temporary.iterdir(), key=lambda path: path.name == INDEX_NAME):
            old = folder / new.name
            if old.is_dir():
                shutil.rmtree(old)
            new.replace(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be JSON, but cannot be read ({error}). Copy or download it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, got {type(values).__name__}. Copy or download it again.")
    return values
