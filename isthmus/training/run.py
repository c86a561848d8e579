"""What surrounds a training loop: its folder, its log, its checkpoints, and how it stops and comes back.

A run folder holds run.json (settings, versions, fingerprints), log.jsonl, previews/, checkpoints/ and, at the end, the
model. The same command again continues from the newest checkpoint; a finished run only exports.
"""

import ctypes
import json
import logging
import os
import platform
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    broadcast_object_list,
    extract_model_from_parallel,
    set_seed,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import isthmus
from isthmus.display import Display
from isthmus.errors import UserError
from isthmus.files import check_only, check_writable, write_whole
from isthmus.nn.draws import weight_seed
from isthmus.nn.precision import TypeChoice, faster_type
from isthmus.processes import process_count
from isthmus.training.checkpoints import Progress, newest_checkpoint, step_of, whole
from isthmus.training.config import Run, read_run_record, run_to_json

logger = logging.getLogger("isthmus")

LogLines = list[dict[str, float]]

# folder, inside that of a run, of the runs that have to be finished before it
STAGES = "stages"

# fields that may change between a run and its continuation: they decide nothing about the weights, but for rounding
_FREE_FIELDS = {
    "label_column",  # what it changes is in the fingerprint of the data
    "caption_column",
    "log_every",
    "preview_every",
    "validate_every",
    "usage_warning",
    "save_every",
    "keep_checkpoints",
    "track",
    "num_workers",
    "out",
    "token_cache",
    # a place: what lies there is told apart by its fingerprint, among the facts
    "tokenizer",
    "strict",
    # where a batch is cut and what is computed twice: sums are rounded in another way
    "accumulate",
    "checkpoint_activations",
    # how previews are drawn, and what the saved model draws with where nothing is asked for
    "sampling",
    # another training, beside the one of the student
    "baseline",
}


def start_run(run: Run, *, find_unused_parameters: bool = False, sharded: Sequence[str] = ()) -> Accelerator:
    """Folders, precision, processes and trackers of a run; `sharded` names the modules that FSDP2 gathers one by one.

    Raises:
        UserError: the folder is another run's, the batch does not divide over the processes, accelerate did not turn on
            the processes or the FSDP2 that were asked for, or the caller has changed torch's defaults.
    """
    launched = process_count()
    _check_defaults_of_torch()
    _keep_freed_memory()
    # asked for, or accelerate takes the processes of a launcher on CPU for so many single ones
    cpu = not torch.accelerator.is_available()
    # the others wait while the first process encodes the data set; launchers notice a dead process by itself
    processes = PartialState(cpu=cpu, timeout=timedelta(days=1))
    precision = _agreed_precision(run, processes)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=run.accumulate, sync_with_dataloader=False),
        log_with=list(run.track) or None,
        project_dir=str(run.out),
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=list(sharded)
        )
        if sharded
        else None,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)],
    )
    accelerator.register_save_state_pre_hook(_save_bare_weights)
    accelerator.register_load_state_pre_hook(_load_bare_models)
    if launched != accelerator.num_processes:
        raise UserError(
            f"the launcher started {launched} processes, accelerate knows {accelerator.num_processes} on "
            f"{accelerator.device.type}. Set ACCELERATE_USE_CPU=1 to train on the CPU, number them in LOCAL_RANK as "
            "torchrun does, or unset WORLD_SIZE and start a single process."
        )
    if sharded and not accelerator.is_fsdp2:
        raise UserError(
            f"parallel fsdp2 needs several processes on GPUs, accelerate chose {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}. Start with `accelerate launch` on GPUs, or use --parallel ddp."
        )
    shares = accelerator.num_processes * run.accumulate
    if run.batch_size % shares:
        raise UserError(
            f"batch_size must be a multiple of processes x accumulate = {accelerator.num_processes} x "
            f"{run.accumulate}, got {run.batch_size}. The batch is the same whatever the number of processes."
        )
    if accelerator.is_main_process:
        check_folder(run)
    accelerator.wait_for_everyone()
    # models draw their initial weights from the global generator; everything later has streams of its own
    set_seed(weight_seed(run.seed))
    return accelerator


def _check_defaults_of_torch() -> None:
    """Networks are made with torch's defaults, which whoever calls may have changed."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if dtype != torch.float32 or device.type != "cpu":
        raise UserError(
            f"training makes its networks in float32 on the CPU, got torch's defaults set to {dtype} and {device}. "
            "Call torch.set_default_dtype(torch.float32) and torch.set_default_device(None) before."
        )


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, unless the environment says how memory is handled.

    It gives large tensors back to the system and faults them in again, page by page: a tenth of a step on a CPU. The
    process keeps its largest size instead.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(parameter, 2**31 - 1)


def _save_bare_weights(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Checkpoints keep the names of the bare model: DDP would write others, which one process could not read."""
    weights[:] = [_bare(model).state_dict() for model in models[: len(weights)]]


def _load_bare_models(models: list[nn.Module], folder: str) -> None:
    models[:] = [_bare(model) for model in models]


def _bare(model: nn.Module) -> nn.Module:
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _agreed_precision(run: Run, processes: PartialState) -> str:
    """Accelerate's name of what products are computed in: the same in every process and after every interruption."""
    names: list[str] = [""]
    if processes.is_main_process:
        names = ["bf16" if _precision(run, torch.device(processes.device or "cpu")).bf16 else "no"]
    if processes.num_processes > 1:
        broadcast_object_list(names)
    if is_initialized() and AcceleratorState().mixed_precision != names[0]:
        # accelerate holds on to the type of the first run of a process, and a demo has several: a new `Accelerator`
        # asks for a restart of the interpreter. There is no public way to forget it (1.x; its own tests use this one).
        AcceleratorState._reset_state()
    return names[0]


def _precision(run: Run, device: torch.device) -> TypeChoice:
    if run.mixed_precision != "auto":
        return TypeChoice(run.mixed_precision == "bf16", f"{run.mixed_precision}: asked for")
    if newest_checkpoint(run.out) is None:
        return faster_type(device)
    # a run goes on in the type that it began with, whatever a busier or another machine would measure
    began = read_run_record(run.out / "run.json").get("precision")
    if began is None:  # recorded before it was measured: float32 on every CPU
        return faster_type(device) if device.type == "cuda" else TypeChoice(False, "float32: as the run began")
    return TypeChoice(bool(began["bf16"]), str(began["why"]))


def check_folder(run: Run) -> None:
    """Refuse a folder that holds something else than this run, or cannot be written."""
    check_writable(run.out)
    path = run.out / "run.json"
    if not path.is_file():
        # earlier stages have records of their own
        check_only(run.out, "the folder of this run", ours=[STAGES])
        return
    record, kind = read_run_record(path), type(run).__name__
    if "kind" not in record or "num_steps" not in record["run"]:
        raise UserError(f"{path} is not the record of a run. Choose another --out.")
    if record["kind"] != kind:
        raise UserError(f"{run.out} holds a {record['kind']}, this is a {kind}. Choose another --out.")
    newest = newest_checkpoint(run.out)
    if newest is None:
        return
    before, now = record["run"], run_to_json(run)
    # a field at its default may be in neither
    known = {*now, *(before.keys() & vars(run).keys())} - {*_FREE_FIELDS}
    changed = sorted(name for name in known if before.get(name) != now.get(name))
    if changed == ["num_steps"]:
        _check_length(run, before["num_steps"], step_of(newest))
    elif changed:
        details = ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in changed[:3])
        raise UserError(
            f"{run.out} holds a run with other settings ({details}). Continue it with its own settings "
            f"(--config {path}), or choose another --out."
        )


def _check_length(run: Run, before: int, taken: int) -> None:
    """Refuse another number of steps where the steps taken would have been others in a run of that many."""
    if run.num_steps < taken:
        raise UserError(
            f"{run.out} has taken {taken} steps, got --num-steps {run.num_steps}. Ask for as many or more, or choose "
            "another --out."
        )
    if tied := run.tied_to_length(before, taken):
        raise UserError(
            f"{run.out} was to take {before} steps, and what {', '.join(tied)} did in the {taken} it took depends on "
            f"that number: a run of {run.num_steps} would have begun otherwise. Finish it as it is, then train on from "
            f"its model in another folder (--from {run.out}); a run with --optim.schedule constant can be made longer."
        )


def write_record(accelerator: Accelerator, run: Run, **facts: Any) -> None:
    """run.json: everything needed to repeat the run, and what it ran on; trackers start here.

    Raises UserError where a run that is continued was started with other `facts`: images, tokenizer.
    """
    if accelerator.is_main_process:
        before = {} if newest_checkpoint(run.out) is None else read_run_record(run.out / "run.json")
        if changed := sorted(name for name, value in facts.items() if before.get(name, value) != value):
            raise UserError(
                f"{run.out} was started with another {' and '.join(changed)}, so it cannot go on as the same run. "
                "Restore the images and the models it began with, or choose another --out."
            )
        run.out.mkdir(parents=True, exist_ok=True)
        precision = _precision(run, accelerator.device)
        record = {
            "kind": type(run).__name__,
            "isthmus_version": isthmus.__version__,
            "run": run_to_json(run),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "processes": accelerator.num_processes,
                "device": str(accelerator.device),
            },
            "precision": asdict(precision),
            **facts,
        }
        write_whole(run.out / "run.json", json.dumps(record, indent=2) + "\n")
        if run.mixed_precision == "auto":
            logger.info("%s", precision.why)
    if run.track:
        flat = {k: v for k, v in run_to_json(run).items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("isthmus", config=flat)


def read_log(path: Path) -> LogLines:
    """Lines of a log.jsonl, but for the last of a killed run, which may be cut."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def column(log: LogLines, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one measurement."""
    rows = [(line["step"], line[name]) for line in log if name in line]
    return [step for step, _ in rows], [value for _, value in rows]


def last(log: LogLines, name: str) -> float:
    """The last value of a measurement; NaN where there is none."""
    return next((line[name] for line in reversed(log) if name in line), float("nan"))


@dataclass
class Log:
    """log.jsonl, one line per measurement, beside the trackers of accelerate."""

    accelerator: Accelerator
    path: Path

    def rewind(self, step: int) -> None:
        """Forget lines after `step`: a killed run may have logged past its last checkpoint."""
        if self.accelerator.is_main_process and self.path.exists():
            kept = [line for line in read_log(self.path) if line["step"] <= step]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, progress: Progress, values: dict[str, float]) -> None:
        """Add one line."""
        self.accelerator.log(values, step=progress.step)
        if self.accelerator.is_main_process:
            rounded = {name: float(f"{value:.8g}") for name, value in values.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": progress.step, "images": progress.images, **rounded}) + "\n")


def means_of(parts: Sequence[Mapping[str, Tensor]], accelerator: Accelerator) -> dict[str, Tensor]:
    """Means of what the parts of a batch measured, over all processes: those of the whole batch. Every process calls.

    Parts and processes hold equal shares, so means of means are means.
    """
    means = {name: torch.stack([part[name].float() for part in parts]).mean(dim=0) for name in parts[0]}
    return accelerator.reduce(means, "mean")  # pyright: ignore[reportReturnType]  any nesting goes in and out


class StopRequest:
    """Ctrl-C or SIGTERM: finish the step, save, stop. A second Ctrl-C stops at once.

    Only the main thread of a program may listen to signals: in any other nothing is heard.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Tensor | None = None
        self._previous: dict[int, Any] = {}

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all must call this at every step, and all get the same answer."""
        if accelerator.num_processes == 1:
            return self.requested
        asked = torch.tensor(float(self.requested), device=accelerator.device)
        before, self._before = self._before, accelerator.reduce(asked, "sum")  # pyright: ignore
        # the answer of a step ago, so that the host does not wait for what the device is busy with
        return before is not None and bool(before)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that is not Python's, which Python cannot set again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step; press Ctrl-C again to stop without saving")


class FiniteGuard:
    """Notices a NaN or Inf without asking the device at every step."""

    def __init__(self, device: torch.device) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def watch(self, *values: Tensor) -> None:
        """Remember whether a value was not finite."""
        for value in values:
            own = value.to_local() if isinstance(value, DTensor) else value
            self._finite &= torch.isfinite(own.detach()).all()

    def check(self, run: Run, step: int, weights: Iterable[Tensor] = ()) -> None:
        """Raise UserError where a watched value, or one of the `weights` to be saved, was not finite."""
        self.watch(*weights)
        if bool(self._finite):
            return
        good = newest_checkpoint(run.out)
        advice = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise UserError(
            f"losses and gradients must be finite, got NaN or Inf at or before step {step}; {advice}. "
            "Lower optim.learning_rate or optim.max_grad_norm and start again in another folder."
        )


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients of a prepared model; returns their norm before, over all shards."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    assert norm is not None, "accelerate returns the norm for every backend used here"
    return whole(norm)


def display(accelerator: Accelerator, run: Run, progress: Progress, what: str) -> Display:
    """What the first process shows of the optimizer steps."""
    return Display(
        what,
        progress.num_steps,
        "step",
        initial=progress.step,
        images_each=run.batch_size,
        shown=accelerator.is_main_process,
    )
