"""Whether `torch.compile` can work here: what asks for it asks this first."""

import os
import shutil

import torch

from isthmus.errors import UserError


def check_compiler(device: torch.device) -> None:
    """Nothing where `torch.compile` has what it needs: on a CPU that is a C++ compiler.

    Raises:
        UserError: the device is a CPU, and there is no compiler.
    """
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("compiling for a CPU needs g++, or the compiler that CXX names, found none. Leave it out.")
