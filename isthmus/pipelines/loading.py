"""One function for any saved pipeline: a trained run, a converted checkpoint, a model on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isthmus.errors import UserError
from isthmus.nn.precision import faster_type
from isthmus.nn.saved_model import values_left_out
from isthmus.pipelines.base import check_not_float16
from isthmus.pipelines.folder import model_folder, read_index
from isthmus.registry import PIPELINES, imported

if TYPE_CHECKING:
    from isthmus.dar.pipeline import DARPipeline
    from isthmus.next_scale.pipeline import NextScalePipeline

    AnyPipeline = NextScalePipeline | DARPipeline
else:
    # the classes are imported when a folder asks for them: each costs seconds
    AnyPipeline = Any

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_pipeline(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> AnyPipeline:
    """A saved pipeline, ready to draw.

    Args:
        path_or_hub_id: a pipeline folder, or a model on the hub; an existing path wins.
        device: "auto" (a CUDA device where there is one, else the CPU; never mps), "cpu", "cuda", "cuda:N" or "mps".
        dtype: "float32" (the default), "bfloat16" or the torch type, or "auto": bf16 where the device computes at least
            twice as fast in it, float32 elsewhere. bf16 casts the weights of every component, so the image tokenizer
            finds other tokens in images than in float32.
        revision: branch, tag or commit on the hub.
        cache_dir: where hub files are kept; None takes the hub's own cache.
        local_files_only: never ask the network.

    Raises UserError where there is no such model, it is incomplete or of a newer format, or the device is absent.
    """
    chosen = choose_device(device)
    folder = model_folder(path_or_hub_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    name = read_index(folder).get("_class_name")
    if name not in PIPELINES:
        raise UserError(f"{folder} holds a {name}; this version loads {', '.join(PIPELINES)}. Update Isthmus.")
    pipeline = imported(PIPELINES[name]).from_pretrained(folder, dtype=choose_dtype(dtype, chosen))
    # shapes without values have no place to go to
    return pipeline if values_left_out() else pipeline.to(chosen)


def choose_device(device: str | torch.device) -> torch.device:
    """The device of that name; UserError where it is not here."""
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        present.append("mps")
    name = str(device)
    if name == "auto":
        return torch.device("cuda" if len(present) > 1 and present[1] == "cuda:0" else "cpu")
    if name not in present and not (name == "cuda" and "cuda:0" in present):
        raise UserError(f"device must be auto or one of those present here ({', '.join(present)}), got {name}.")
    return torch.device(name)


def choose_dtype(dtype: torch.dtype | str | None, device: str | torch.device = "cpu") -> torch.dtype:
    """The type of that name (UserError for others); None is float32, "auto" what `faster_type` finds on the device."""
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return torch.bfloat16 if faster_type(torch.device(device)).bf16 else torch.float32
    check_not_float16(dtype)
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise UserError(f"dtype must be one of {', '.join(DTYPES)} or auto, got {dtype}.")
    return chosen


def dtype_name(dtype: str, device: str | torch.device) -> str:
    """Name of the type that `load_pipeline` takes: what is written down where "auto" was asked for.

    >>> dtype_name("bfloat16", "cpu")
    'bfloat16'
    """
    chosen = choose_dtype(dtype, choose_device(device))
    return next(name for name, known in DTYPES.items() if known == chosen)
