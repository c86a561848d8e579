"""Whether `torch.compile` can work here: what asks for it asks this first."""

import os
import shutil

import torch

from isthmus.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Nothing where `torch.compile` has what it needs: on a CPU that is a C++ compiler.

    Raises:
        UserError: the device is a CPU, and there is no compiler, or torch is held to another instruction set than the
            compiler writes for.
    """
    held = os.environ.get("ATEN_CPU_CAPABILITY")
    if device.type == "cpu" and held:
        # it also keeps what it made, and finds it again whatever this variable says
        raise UserError(
            f"torch's compiler takes no notice of ATEN_CPU_CAPABILITY, got {held}: results would be those of neither. "
            "Unset it, or do not compile."
        )
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("compiling for a CPU needs g++, or the compiler that CXX names, found none. Leave it out.")
