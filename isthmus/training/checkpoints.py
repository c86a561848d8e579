"""Checkpoints that a killed run can trust: complete under their final name, or not there.

A checkpoint folder holds accelerate's state (models, optimizers), ema.safetensors, extras.safetensors (what else the
loop keeps) and progress.json. It is written as `checkpoint-STEP.partial`, flushed, renamed; only then the oldest goes.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from isthmus.training.ema import ExponentialMovingAverage

if TYPE_CHECKING:
    from isthmus.training.run import Progress


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run folder, or None."""
    found = _checkpoints(out)
    return found[-1] if found else None


def _checkpoints(out: Path) -> list[Path]:
    folder = out / "checkpoints"
    names = [p for p in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", p.name)] if folder.is_dir() else []
    return sorted(names, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(
    accelerator: Accelerator,
    ema: ExponentialMovingAverage,
    progress: "Progress",
    out: Path,
    *,
    keep: int,
    extras: dict[str, Tensor] | None = None,
) -> None:
    """Write the state after `progress.step`; keep the newest `keep` checkpoints."""
    final = out / "checkpoints" / f"checkpoint-{progress.step:08d}"
    if final.exists():
        return
    partial = final.with_name(final.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial), safe_serialization=True)
    averages = gathered(ema.state_dict())
    if accelerator.is_main_process:
        save_file(averages, partial / "ema.safetensors")
        save_file({k: v.contiguous() for k, v in (extras or {}).items()}, partial / "extras.safetensors")
        (partial / "progress.json").write_text(json.dumps({"step": progress.step, "images": progress.images}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _flush(partial)
        partial.rename(final)
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old)
        for leftover in final.parent.glob("*.partial"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()


def resume(
    accelerator: Accelerator, ema: ExponentialMovingAverage, progress: "Progress", out: Path
) -> dict[str, Tensor] | None:
    """Load the newest checkpoint into everything prepared; returns its extras, or None where there is none."""
    newest = newest_checkpoint(out)
    if newest is None:
        return None
    accelerator.load_state(str(newest))
    averages = load_file(newest / "ema.safetensors")
    ema.load_state_dict({name: like(ema.averages.get(name), value) for name, value in averages.items()})
    state = json.loads((newest / "progress.json").read_text())
    progress.step = progress.started_at = state["step"]
    progress.images = state["images"]
    return load_file(newest / "extras.safetensors")


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU; shards are collected from all ranks (every rank must call)."""
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    return {name: t.detach().to("cpu").contiguous() for name, t in whole.items()}


def like(template: Tensor | None, whole: Tensor) -> Tensor:
    """A whole tensor laid out like `template`: sharded where that is sharded."""
    if isinstance(template, DTensor):
        return distribute_tensor(whole.to(template.device), template.device_mesh, template.placements)
    return whole


def _flush(folder: Path) -> None:
    """Contents before the name: after a power cut a renamed folder must not hold empty files."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
