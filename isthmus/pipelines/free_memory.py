"""How much memory a device has left. It knows no model, so that both families can ask."""

import os

import torch

_LARGEST = 64  # larger batches are no faster, and progress is seen less often
_SHARE = 0.5  # of what is free: the allocator and everything else on the machine need the rest


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; for mps and systems that do not say, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30


def images_that_fit(device: torch.device, bytes_each: int) -> int:
    """Images of so many bytes that fit into the share of the free memory that one call may take: 1..64."""
    return max(1, min(_LARGEST, int(_SHARE * free_bytes(device)) // bytes_each))
