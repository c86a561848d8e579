"""Checkpoints that a killed run can trust: complete under their final name, or not there.

A checkpoint folder holds accelerate's state (models, optimizers), ema.safetensors, extras.safetensors (what else the
loop keeps) and progress.json. It is written as `checkpoint-STEP.partial`, flushed, renamed; only then the oldest goes.
"""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from isthmus.errors import UserError
from isthmus.training.optim import ExponentialMovingAverage


@dataclass
class Progress:
    """Where a run stands. `step` counts optimizer steps; `images` those seen over all processes."""

    step: int = 0
    images: int = 0
    num_steps: int = 0
    stream_states: list[dict[str, Any]] | None = None
    """Where a stream stands, one entry per process; None for data read by index."""

    def due(self, every: int, *, ahead: int = 0) -> bool:
        """Whether something done every so many steps is due after this step (or `ahead` more), the last included."""
        step = self.step + ahead
        return step % every == 0 or step == self.num_steps


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run folder, or None."""
    return next(reversed(_checkpoints(out)), None)


def _checkpoints(out: Path) -> list[Path]:
    paths = (out / "checkpoints").glob("checkpoint-*")
    return sorted((p for p in paths if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def save_checkpoint(
    accelerator: Accelerator,
    ema: ExponentialMovingAverage,
    progress: Progress,
    out: Path,
    *,
    keep: int,
    extras: dict[str, Tensor] | None = None,
) -> None:
    """Write the state after `progress.step`; keep the newest `keep` checkpoints. Every process must call.

    Raises UserError where that fails; no checkpoint has changed then.
    """
    final = out / "checkpoints" / f"checkpoint-{progress.step:08d}"
    if final.exists():
        return
    partial = final.with_name(final.name + ".partial")
    with written_or_explained(final, partial):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial), safe_serialization=True)
        averages = gathered(ema.state_dict())
        if accelerator.is_main_process:
            save_file(averages, partial / "ema.safetensors")
            save_file({k: v.contiguous() for k, v in (extras or {}).items()}, partial / "extras.safetensors")
            record = {name: value for name, value in vars(progress).items() if name != "num_steps"}
            (partial / "progress.json").write_text(json.dumps(record), encoding="utf-8")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _flush(*partial.rglob("*"), partial)
            partial.rename(final)
            # the new name must be on the disk before the old checkpoints go
            _flush(final.parent)
    if accelerator.is_main_process:
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old)
        for leftover in final.parent.glob("*.partial"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()


def resume(
    accelerator: Accelerator, ema: ExponentialMovingAverage, progress: Progress, out: Path
) -> dict[str, Tensor] | None:
    """Load the newest checkpoint into everything prepared; returns its extras, or None where there is none.

    Raises UserError for one that cannot be read, or of another network.
    """
    newest = newest_checkpoint(out)
    if newest is None:
        return None
    try:
        accelerator.load_state(str(newest))
        averages = load_file(newest / "ema.safetensors")
        ema.load_state_dict({name: like(ema.averages.get(name), value) for name, value in averages.items()})
        state = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
        progress.step, progress.images = int(state["step"]), int(state["images"])
        progress.stream_states = state["stream_states"]
        # a checkpoint lies between two batches; how many parts a batch has may have changed
        accelerator.step = 0
        return load_file(newest / "extras.safetensors")
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"a checkpoint must be whole and of this run, got {newest}, which cannot be read ({_first_line(error)}). "
            "Delete that folder: the same command then continues from the one before, or starts again."
        ) from error


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU; shards are collected from all ranks (every rank must call)."""
    return {name: whole(tensor).detach().to("cpu").contiguous() for name, tensor in state.items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor collected from its shards (every rank must call), or itself where it has none."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(template: Tensor | None, tensor: Tensor) -> Tensor:
    """A whole tensor laid out like `template`: sharded where that is sharded."""
    if isinstance(template, DTensor):
        return distribute_tensor(tensor.to(template.device), template.device_mesh, template.placements)
    return tensor


@contextmanager
def written_or_explained(target: Path, *temporary: Path) -> Iterator[None]:
    """Writing that fails takes its temporary folders away and becomes one UserError about `target`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # torch and safetensors report a full disk as errors of their own
    except (OSError, SafetensorError, RuntimeError) as error:
        for leftover in temporary:
            shutil.rmtree(leftover, ignore_errors=True)
        # errors without a number come from writers of files that grew too large
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Free some space" if full else "See that the folder is there and can be written"
        raise UserError(
            f"{target} could not be written ({_first_line(error)}). {advice} and give the same command again: it "
            "continues from the newest checkpoint."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def _flush(*paths: Path) -> None:
    """Contents before the name: after a power cut a renamed folder must not hold empty files."""
    for path in paths:
        # Windows opens no folders, and some network file systems flush none
        with suppress(OSError) if path.is_dir() else nullcontext():
            # to be flushed, a file has to be open for writing on Windows
            handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
