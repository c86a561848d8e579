"""Which type products are computed in, and whether `torch.compile` can work here.

Tokens and features of images should be those of any other device, so they are searched in whole fp32. Elsewhere bf16
pays where the machine has products of it, which no name of a processor tells: it is measured.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import torch
from torch.nn.functional import linear

from isthmus.errors import UserError

# how many times as fast as in float32 products must run in bf16 before its rounding is worth while
_WORTH_WHILE = 2.0


@contextmanager
def whole_fp32() -> Iterator[None]:
    """No TF32 inside: GPUs since Ampere round the products of convolutions to 10 bits unless they are told not to."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@dataclass(frozen=True)
class TypeChoice:
    """Whether products are computed in bf16, and why."""

    bf16: bool
    why: str


def faster_type(device: torch.device) -> TypeChoice:
    """What `auto` means on this device: bf16 where it pays, float32 elsewhere. The same for the whole process."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return TypeChoice(has, "bf16: this GPU has it" if has else "float32: this GPU has no bf16")
    if device.type != "cpu":
        return TypeChoice(False, f"float32: bf16 is not tried on {device.type}")
    bf16 = bf16_speedup() >= _WORTH_WHILE
    name = "bf16" if bf16 else "float32"
    return TypeChoice(bf16, f"{name}: products in bf16 run {bf16_speedup():.1f} times as fast as in float32 here")


@cache
def bf16_speedup() -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bf16, with the threads it has now.

    Measured once per process, in a quarter of a second at worst. A core that others use should answer as a quiet one
    does, so that the best of a few tries counts.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16) * 4:
        x, weight = torch.ones(256, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
        with torch.no_grad():
            linear(x, weight)  # the first call of a kernel prepares it
            start = perf_counter()
            linear(x, weight)
        seconds.setdefault(dtype, []).append(perf_counter() - start)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def check_compiler(device: torch.device) -> None:
    """Raise UserError where `torch.compile` cannot work: on a CPU, without g++ or under `ATEN_CPU_CAPABILITY`."""
    held = os.environ.get("ATEN_CPU_CAPABILITY")
    if device.type == "cpu" and held:
        # it also keeps what it made, and finds it again whatever this variable says
        raise UserError(
            f"torch's compiler takes no notice of ATEN_CPU_CAPABILITY, got {held}: results would be those of neither. "
            "Unset it, or do not compile."
        )
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("compiling for a CPU needs g++, or the compiler that CXX names, found none. Leave it out.")
