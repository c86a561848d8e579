"""The D-AR fixtures as the files that the published training scripts leave behind."""

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def write_published_files(golden, folder: Path, *, config: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Tokenizer and prior as `.pt`: settings as objects, EMA beside other weights, prefixes of compiled modules."""
    tokenizer = {k: v.float() for k, v in golden.tensors("dar/tok_a_weights.safetensors").items()}
    prior = {k: v.float() for k, v in golden.tensors("dar/gpt_weights.safetensors").items()}
    config = golden.json("dar/config.json")["tokenizer_a"] if config is None else config
    args = argparse.Namespace(gpt_model="GPT-B", lr=1e-4)
    module = ModuleType("config_util")
    module.Config = type("Config", (), {"__module__": "config_util"})
    settings = module.Config()
    settings._data = config
    sys.modules["config_util"] = module
    try:
        torch.save(
            {
                "model": {key: torch.zeros_like(value) for key, value in tokenizer.items()},
                "ema": tokenizer,
                "optimizer": {"state": {}},
                "steps": 7,
                "args": args,
                "config": settings,
            },
            folder / "tokenizer.pt",
        )
    finally:
        del sys.modules["config_util"]
    torch.save(
        {"model": {f"_orig_mod.{key}": value for key, value in prior.items()}, "steps": 7, "args": args},
        folder / "prior.pt",
    )
    return folder / "tokenizer.pt", folder / "prior.pt"
