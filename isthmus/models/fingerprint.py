"""What identifies a model: its configuration and every weight."""

import hashlib
import json

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over the configuration and all weights, independent of device and memory layout.

    Two models with the same fingerprint give the same tokens; a token cache is tied to its tokenizer by it.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in dict(getattr(model, "config", {})).items() if not k.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=list).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
