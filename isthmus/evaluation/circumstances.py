"""When, where and with which versions an evaluation ran: it should not matter to the scores, and is kept anyway."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import isthmus

_PACKAGES = ("torch", "transformers", "numpy", "pillow", "torch-fidelity")


def circumstances(device: torch.device, *, processes: int) -> dict[str, Any]:
    """Date (UTC), versions and hardware, in JSON values."""
    found = {"isthmus": isthmus.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": found,
        "device": str(device),
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "system": platform.platform(),
    }


def timing_words(device: torch.device) -> str:
    """What a time was taken on: device, its name, threads."""
    return f"{device.type} ({_hardware(device)}), {torch.get_num_threads()} threads"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
