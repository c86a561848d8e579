"""Where rounding matters: tokens and features of images should be those of any other device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def whole_fp32() -> Iterator[None]:
    """No TF32 inside: GPUs since Ampere round the products of convolutions to 10 bits unless they are told not to.

    It changes nothing for other types than float32, and serves as a decorator as well.

    >>> with whole_fp32():
    ...     torch.backends.cudnn.allow_tf32
    False
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
