"""Reading other people's weight files without running any code that they may carry."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from isthmus.errors import UserError

logger = logging.getLogger("isthmus")


class _StandIn:
    """Takes the place of an object of foreign settings: keeps the attributes it is given and does nothing else."""

    def __init__(self, *args: object):
        del args


# Training files of D-AR hold their settings as objects of these two classes. Their names lead to empty classes of ours,
# so that nothing of the real ones is ever looked up, let alone run.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    type(name, (_StandIn,), {"__module__": module})
    for module, name in (("argparse", "Namespace"), ("config_util", "Config"))
]


@dataclass
class PublishedFile:
    """What `read_file` found.

    Attributes:
        weights: tensors by their published keys.
        config: settings stored beside the weights, as plain values; empty where the file has none.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]


def read_weights(path: str | Path, *, nested: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a file; see `read_file`, which also gives its settings."""
    return read_file(path, nested=nested).weights


def read_file(path: str | Path, *, nested: tuple[str, ...] = ()) -> PublishedFile:
    """Contents of a `.safetensors` or `.pth` file, without running any code that the file may carry.

    Bare state dicts, training checkpoints (`nested` names the entries to look into, such as `var_wo_ddp`), the
    prefixes `module.` and `_orig_mod.` and EMA copies (preferred where a file has both) are understood. Objects of
    `argparse.Namespace` and `config_util.Config` become inert stand-ins; any other object is refused.

    Raises:
        UserError: the file is absent, truncated, or holds something else than tensors and settings.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights must be a file, got {path}, which does not exist. Pass a .pth or .safetensors file.")
    try:
        if path.suffix == ".safetensors":
            raw: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(_STAND_INS):
                raw = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} cannot be read as weights ({_first_line(error)}). Download it again.") from error
    except UnpicklingError as error:
        if "Unsupported global" not in str(error) and "Unsupported class" not in str(error):
            raise UserError(f"{path} is no PyTorch file, or not the whole of one. Download it again.") from error
        raise UserError(
            f"{path} holds objects other than tensors, and Isthmus never runs pickled code. "
            "Save its state dict alone (torch.save(model.state_dict(), ...)) or as safetensors."
        ) from error
    config = _plain(raw.get("config")) if isinstance(raw, Mapping) else None
    return PublishedFile(_unwrap(raw, nested, path), config if isinstance(config, dict) else {})


def _plain(value: Any) -> Any:
    """Settings without their classes: a Config is its `_data`, a Namespace its attributes."""
    if isinstance(value, _StandIn):
        return _plain(vars(value).get("_data", vars(value)))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _unwrap(raw: Any, nested: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    wrappers = ("trainer", *nested, "ema", "model_ema", "ema_state_dict", "state_dict", "model", "module")
    while isinstance(raw, Mapping):
        inner = next((name for name in wrappers if isinstance(raw.get(name), Mapping)), None)
        if inner is None:
            break
        logger.info("%s: taking the weights under %r", path.name, inner)
        raw = raw[inner]
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} must hold a state dict, got {type(raw).__name__}. Pass a state dict.")
    if not any(isinstance(value, Tensor) for value in raw.values()):
        raise UserError(f"{path} holds no tensors, only {sorted(map(str, raw))[:5]}. Pass a state dict.")
    strange = [key for key, value in raw.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise UserError(f"{path} must hold tensors only, got others under {strange[:3]}. Pass a state dict.")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in raw.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
