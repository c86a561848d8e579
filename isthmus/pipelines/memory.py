"""How many images fit into memory at once, from what is free and from the sizes of the networks."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from isthmus.errors import UserError
from isthmus.pipelines.base import SavedPipeline

_LARGEST = 64  # larger batches are no faster, and progress is seen less often
_MOST_TOKENS = 2**16  # larger passes are no faster
_SHARE = 0.5  # of what is free: the allocator and everything else on the machine need the rest


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device, within what a container may use; 4 GiB for mps and where nothing says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Windows has no sysconf, macOS not this number
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return min([os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *container_bytes()])
    return 4 * 2**30


def container_bytes(root: Path = Path("/")) -> list[int]:
    """What is left of every memory limit that Linux sets to this process: in a container sysconf tells of the host.

    Files that were read count as use until the memory is wanted for something else, so they are taken off.
    """
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # version 2 has one tree for all, version 1 one for memory
        tree = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inner = tree / path.lstrip("/")
        # limits of outer groups hold too; seen from inside a container, its own group is the tree
        for folder in (inner, *inner.parents):
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():
                files = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                left.append(max(int(limit) - int(used) + (int(files[1]) if files else 0), 0))
            if folder == tree:
                break
    return left


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def images_that_fit(device: torch.device, bytes_each: int) -> int:
    """Images of so many bytes that fit into the share of the free memory that one call may take: 1..64."""
    return max(1, min(_LARGEST, int(_SHARE * free_bytes(device)) // bytes_each))


def tokens_that_fit(device: torch.device, bytes_each: int) -> int:
    """Tokens of so many bytes that one pass reads in that share: 1..65,536."""
    return max(1, min(_MOST_TOKENS, int(_SHARE * free_bytes(device)) // bytes_each))


def batch_size_that_fits(pipeline: SavedPipeline, *, guided: bool) -> int:
    """Images per batch for this pipeline where it is now: 1..64."""
    return images_that_fit(pipeline.device, pipeline.bytes_per_image(guided=guided))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@contextmanager
def naming_next_batch_size(batch_size: int, *, advice: str = "") -> Iterator[None]:
    """Where memory runs out in the block: a UserError with this advice, or with the --batch-size to try next."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"Try --batch-size {batch_size // 2}."
        smaller = smaller if batch_size > 1 else "Use a smaller model or --dtype bfloat16."
        raise UserError(f"memory ran out at batch size {batch_size}. {advice or smaller}") from error
