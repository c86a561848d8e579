"""Timing on a machine that others use too: everything in interleaved rounds, compared within a round."""

import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F


@dataclass
class Times:
    """Seconds per round of one thing that was timed; `cpu` is the time of the process over all its threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def __add__(self, other: "Times") -> "Times":
        def added(a: list[float], b: list[float]) -> list[float]:
            return [x + y for x, y in zip(a, b, strict=True)]

        return Times(added(self.wall, other.wall), added(self.cpu, other.cpu))

    def ratio(self, other: "Times") -> tuple[float, float]:
        """How many times longer than `other` this took, by wall and by CPU time: medians of the rounds' ratios."""
        wall, cpu = (
            statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in ((self.wall, other.wall), (self.cpu, other.cpu))
        )
        return wall, cpu

    def milliseconds(self) -> str:
        """Median wall and CPU time."""
        return f"{1e3 * statistics.median(self.wall):,.1f} / {1e3 * statistics.median(self.cpu):,.1f}"


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Time all `runs` in turn, `rounds` times over, after one round that does not count.

    A run that undoes or continues another (an optimiser step after its backward) stands right behind it.
    """
    times = {name: Times() for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


class Gemm:
    """The four matrix products of a transformer block at given sizes: what the machine can do at these shapes."""

    def __init__(self, rows: int, width: int, repeat: int, dtype: torch.dtype = torch.float32):
        self.repeat = repeat
        self.pairs = [(torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)) for k, n in block_products(width)]
        self.flops = repeat * sum(2 * rows * k * n for k, n in block_products(width))

    def __call__(self) -> None:
        with torch.inference_mode():
            for _ in range(self.repeat):
                for x, weight in self.pairs:
                    F.linear(x, weight)

    def rate(self, times: Times) -> tuple[float, float]:
        """GFLOP/s by wall and by CPU time."""
        return tuple(self.flops / statistics.median(t) / 1e9 for t in (times.wall, times.cpu))

    def share(self, flops: float, times: Times, own: Times) -> tuple[float, float]:
        """Rate at which `flops` ran in `times`, over the rate of the products in the same round (`own`)."""
        wall, cpu = own.ratio(times)
        return wall * flops / self.flops, cpu * flops / self.flops


def block_products(width: int) -> list[tuple[int, int]]:
    """Input and output widths of the linear layers of a block: queries, keys, values; out; up; down."""
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]


def both(pair: tuple[float, float], form: str) -> str:
    """Wall and CPU figure of a table cell."""
    return " / ".join(format(value, form) for value in pair)


def in_child(script: str, *arguments: str) -> list[float]:
    """Numbers that a script beside this one prints on its last line, in a fresh process."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(number) for number in printed.splitlines()[-1].split()]


def peak_mib() -> float:
    """Largest resident memory this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # not ru_maxrss: on Linux a child starts with the peak of its parent
        return float(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine() -> str:
    """Versions, processor and load, in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, {model}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.2f}"
    )
