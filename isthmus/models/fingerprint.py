"""What identifies a model: its configuration and every weight."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from isthmus.models.stored_llama import StoredLlama

# what transformers notes about the file, not about the network
_WRITER = {"architectures", "dtype", "transformers_version"}
# settings that came after format 1: at these values a network is what it was before they existed
_LATER = {"has_mask_embedding": False, "pixel_unshuffle": 1}


def fingerprint(model: nn.Module | StoredLlama) -> str:
    """SHA-256 (hex) over the configuration and all weights, independent of device and memory layout.

    Two models with the same fingerprint give the same tokens; a token cache is tied to its tokenizer by it.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", {})
    # transformers' configurations are no mappings; what differs from their defaults is what makes the network
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
    config = {k: v for k, v in values.items() if not (k.startswith("_") or k in _WRITER)}
    config = {k: v for k, v in config.items() if k not in _LATER or v != _LATER[k]}
    digest.update(json.dumps(config, sort_keys=True, default=list).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
