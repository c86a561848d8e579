"""What a step costs: times in interleaved rounds, and the peak of the memory that its tensors take."""

import os
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


def interleaved_seconds(runs: Mapping[str, Run], device: torch.device, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in each round, all runs in turn: what else the machine does hits them alike.

    A first round that does not count warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(run: Run, device: torch.device) -> int:
    """Bytes that tensors of a run hold at most beyond those that were there before; run it once before, to warm up.

    On CPU every allocation is counted by torch's profiler, so the number does not depend on what the system's
    allocator keeps; buffers inside libraries of kernels are not counted. On CUDA it is the allocator's own peak.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    # the profiler's own library announces its start and end on stderr otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None, "the profile has ended"
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  the stub lacks it
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
