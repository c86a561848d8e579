"""How much memory a device has left. It knows no model, so that both families can ask."""

import os

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; for mps and systems that do not say, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30
