"""Published weight files: read without running code, renamed key by key, loaded strictly."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.nn.perceptual import TAP_BLOCKS, Lite0Distance, LPIPSDistance
from isthmus.nn.saved_model import check_finite, misfits, shapes_of

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


_LISTING = ".index.json"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
# under which names checkpoints keep a network, as entries or as prefixes of keys; averaged weights go first
_AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "params_ema")
_WRAPPERS = ("state_dict", "model", "module", "params")
_TORCH_STARTS = (b"PK", b"\x80")
# compiled, sharded and checkpointed parts of a network carry these anywhere in their keys
_WRAPPED_PART = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# how files begin that are often taken for weights, and what they are
_OTHER_KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS (`git lfs pull` fetches the file itself)"),
    (b"<", "a web page: the download did not work"),
    (b"GGUF", "a GGUF file, whose weights are quantized for other software"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"{", "JSON"),
)


StateDict = dict[str, Tensor]
AnyModule = TypeVar("AnyModule", bound=nn.Module)
# by what a file is known, the most telling key first
_KINDS = {
    "cls_embedding.embedding_table.weight": "D-AR prior",
    "query_embedding.weight": "D-AR tokenizer",
    "text_pooler.weight": "Switti prior",
    "pos_1LC": "VAR prior",
    "quantize.embedding.weight": "VAR tokenizer",
}


def read_weights(path: str | Path, *, nested: tuple[str, ...] = ()) -> StateDict:
    """The tensors of a file; see `read_file`, which also gives its settings."""
    return read_file(path, nested=nested)[0]


def read_file(path: str | Path, *, nested: tuple[str, ...] = ()) -> tuple[StateDict, dict[str, Any]]:
    """Tensors by their published keys, and settings as plain values, of a `.safetensors` or `.pth` file.

    Bare state dicts, training checkpoints (`nested` names the entries to look into, such as `var_wo_ddp`), EMA copies
    (preferred where a file has both) and the prefixes that wrappers put before every key (`module.`, `_orig_mod.` and
    the like) are understood. Of a sharded checkpoint, the listing (`*.index.json`) or its folder stands for all shards.
    No code in the file is run. Raises UserError where it is absent, truncated, or holds other things.
    """
    path = Path(path)
    files = _files(path)
    raw = _read(files[0]) if len(files) == 1 else _joined(files)
    config = _plain(raw.get("config")) if isinstance(raw, Mapping) else None
    weights = _without_prefixes(_unwrap(raw, nested, path), nested, path)
    return weights, config if isinstance(config, dict) else {}


def _files(path: Path) -> list[Path]:
    """The file, or every shard that a listing names."""
    if path.is_dir():
        listings = sorted(path.glob(f"*{_LISTING}"))
        single = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        if not listings and len(single) == 1:
            return single
        if len(listings) != 1:
            held = ", ".join(file.name for file in (listings or single)[:4]) or "no weights"
            raise UserError(
                f"weights must be a file or a sharded checkpoint, got the folder {path} with {held}. Name one file."
            )
        path = listings[0]
    if not path.is_file():
        raise UserError(f"weights must be a file, got {path}, which does not exist. Pass a .pth or .safetensors file.")
    if not path.name.endswith(_LISTING):
        shard = re.fullmatch(r"(.*)-\d+-of-0*(\d+)(\.\w+)", path.name)
        if shard and int(shard[2]) > 1:
            listing = path.with_name(f"{shard[1]}{shard[3]}{_LISTING}")
            raise UserError(
                f"{path} is one of {shard[2]} shards. Pass the listing of all, {listing.name}"
                + (", which lies beside it." if listing.is_file() else ", with all shards beside it.")
            )
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} must list the shards of a checkpoint (weight_map). Pass the weights themselves."
        ) from error
    # a listing names files beside it and nothing else
    missing = [name for name in names if Path(str(name)).name != name or not (path.parent / name).is_file()]
    if missing or not names:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"all shards that {path} names must lie beside it, but {missing[0] if missing else 'it names none'}{more} "
            "is not there. Copy or download them all."
        )
    return [path.parent / name for name in names]


def _joined(files: list[Path]) -> StateDict:
    joined: StateDict = {}
    for file in files:
        found = _read(file)
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"a shard holds tensors by name, {file} holds other things. Pass those of a state dict.")
        twice = sorted(set(joined) & set(found))
        if twice:
            raise UserError(
                f"every tensor lies in one shard, {twice[0]} lies in two ({file} is one). Pass whole shards."
            )
        joined |= found
    return joined


def _read(path: Path) -> Any:
    """What a file holds, by its content and not by its name."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}). Check the file and its permissions.") from error
    other = next((what for start, what in _OTHER_KINDS if head.startswith(start)), None if head.strip() else "empty")
    if other:
        raise UserError(f"{path} must hold weights, but is {other}. Pass a .pth or .safetensors file.")
    try:
        if head[8:9] == b"{" and not head.startswith(_TORCH_STARTS):
            return load_file(path)
        # opened here: by its name torch would take another reader
        with torch.serialization.safe_globals(_STAND_INS), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as weights ({said}). It is no file of PyTorch or safetensors, or not the whole of "
            "one: pass another, or copy or download it again."
        ) from error
    except UnpicklingError as error:
        if "Unsupported global" not in str(error) and "Unsupported class" not in str(error):
            raise UserError(
                f"{path} is no PyTorch file, or not the whole of one. Pass another, or copy or download it again."
            ) from error
        raise UserError(
            f"{path} holds objects other than tensors, and Isthmus never runs pickled code. "
            "Save its state dict alone (torch.save(model.state_dict(), ...)) or as safetensors."
        ) from error


def _plain(value: Any) -> Any:
    """Settings without their classes: a Config is its `_data`, a Namespace its attributes."""
    if isinstance(value, _StandIn):
        return _plain(vars(value).get("_data", vars(value)))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _unwrap(raw: Any, nested: tuple[str, ...], path: Path) -> StateDict:
    wrappers = ("trainer", *nested, *_AVERAGED, *_WRAPPERS)
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
    return dict(raw)


def _without_prefixes(weights: StateDict, nested: tuple[str, ...], path: Path) -> StateDict:
    """Keys without what wrappers put before them; of several networks under such names, the first that is preferred."""
    renamed: StateDict = {}
    for key, value in weights.items():
        bare = re.sub(r"^(?:module\.)+", "", _WRAPPED_PART.sub("", key))
        if bare in renamed:
            raise UserError(f"{path} holds {bare} twice, once as {key}. Pass the state dict of one network.")
        renamed[bare] = value
    fronts = {key.partition(".")[0] for key in renamed}
    known = [name for name in (*_AVERAGED, *nested, *_WRAPPERS) if name in fronts]
    if not known or fronts - set(known) or not all("." in key for key in renamed):
        return renamed
    front = f"{known[0]}."
    logger.info("%s: taking the weights under %r", path.name, known[0])
    return _without_prefixes(
        {key.removeprefix(front): value for key, value in renamed.items() if key.startswith(front)}, nested, path
    )


@dataclass
class Converted:
    """One converted file: constructor arguments, weights under our names, and why each dropped key is not needed."""

    arguments: dict[str, Any]
    state: StateDict
    dropped: dict[str, str] = field(default_factory=dict)


@dataclass
class ConvertedPipeline:
    """A pipeline, ready to draw and to save, and of each file the dropped keys with why they are not needed."""

    pipeline: Any
    dropped_tokenizer_keys: dict[str, str]
    dropped_prior_keys: dict[str, str]


def load_strict(model: AnyModule, state: StateDict, what: str) -> AnyModule:
    """The model with these weights, all of them and no others; UserError names the first that do not fit."""
    if problems := misfits(shapes_of(model.state_dict()), shapes_of(state)):
        raise UserError(
            f"{what} does not fit the network: {problems}. It is incomplete, or of another network: pass another file."
        )
    check_finite(state, what)
    model.load_state_dict(state)
    return model


def build(kind: type[AnyModule], converted: Converted, what: str) -> AnyModule:
    """A network with the converted weights, in eval mode; UserError as `load_strict`."""
    return load_strict(kind(**converted.arguments), converted.state, what).eval()


def rename(
    raw: Mapping[str, Tensor],
    rules: list[tuple[str, str]],
    droppable: dict[str, str],
    what: str,
    landmark: str,
    *,
    seen: Iterable[str] | None = None,
) -> tuple[StateDict, dict[str, str]]:
    """Weights under our names (floats as fp32), and every dropped key with its reason.

    Args:
        rules: (published key, our key) as regular expression and replacement; the first that matches the whole key
            decides.
        droppable: pattern of keys that are not needed -> why.
        landmark: a key by which such a file (`what`, in errors) is known.
        seen: all keys of the file, where `raw` is a part of it.

    Raises UserError where the landmark is absent, or a key matches nothing.
    """
    if landmark not in raw:
        raise UserError(
            f"a {what} holds {landmark}, this file does not: {_seen(raw if seen is None else seen, landmark)}"
        )
    state, dropped, unknown = {}, {}, []
    for key, tensor in raw.items():
        reason = next((why for pattern, why in droppable.items() if re.fullmatch(pattern, key)), None)
        rule = next(((p, ours) for p, ours in rules if re.fullmatch(p, key)), None)
        if reason:
            dropped[key] = reason
        # two layouts of phi lead to one name of ours: a file has one of them
        elif rule and (ours := re.sub(rule[0], rule[1], key)) not in state:
            state[ours] = tensor.float() if tensor.is_floating_point() else tensor
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"a {what} has no such keys: {sorted(unknown)[:4]} ({len(unknown)} in all). It is of "
            "another network, or was changed: pass a published file."
        )
    return state, dropped


def _seen(keys: Iterable[str], landmark: str) -> str:
    keys = sorted(keys)
    inside = next((key for key in keys if key.endswith(f".{landmark}")), None)
    if inside is not None:
        return f"it has {inside}. Save the state dict of the part under {inside.removesuffix(f'.{landmark}')!r} alone."
    kind = next((kind for mark, kind in _KINDS.items() if mark in keys), None)
    if kind is not None:
        return f"it is a {kind}. Pass it as such."
    fronts = Counter(key.partition(".")[0] for key in keys)
    shown = ", ".join(f"{front} ({count})" for front, count in fronts.most_common(6)) or "nothing"
    return (
        f"its keys begin with {shown}, such as {keys[:2]}. Pass a published file, or its state dict under those keys."
    )


def perceptual_distance(
    kind: Literal["lite0", "lpips"], *, lpips_weights: Sequence[Path] = (), taps: Sequence[int] = TAP_BLOCKS
) -> Lite0Distance | LPIPSDistance:
    """The distance that a run names: `lite0` comes with the package, `lpips` needs files of the user's."""
    return Lite0Distance(taps=taps) if kind == "lite0" else lpips_distance(*lpips_weights)


def lpips_distance(*paths: Path) -> LPIPSDistance:
    """LPIPS of torchvision's VGG16 file and the LPIPS heads, or of a saved LPIPS module; UserError for other files."""
    weights: StateDict = {}
    for path in paths:
        found = read_weights(path)
        check_finite(found, path)
        # LPIPS reads no classifier; a saved module repeats its heads under `lins`, and keeps its constants
        left_out = [key for key in found if key.split(".")[0] in ("classifier", "lins", "scaling_layer")]
        if left_out:
            logger.info("%s: %d weights that LPIPS does not read are left out: %s", path.name, len(left_out), left_out)
        kept = found.keys() - left_out
        weights |= {re.sub(r"^net\.slice\d+\.(\d+\.\w+)$", r"features.\1", key): found[key] for key in kept}
    return LPIPSDistance(weights)


def check_belong(name: str, of_tokenizer: int, of_prior: int, tokenizer: object, prior: object) -> None:
    """Raise UserError where the files of a tokenizer and a prior do not have the same number of something."""
    if of_tokenizer != of_prior:
        raise UserError(
            f"tokenizer and prior must have the same {name}, got {of_tokenizer} in {tokenizer} and {of_prior} in "
            f"{prior}. Pass the tokenizer that the prior was trained with."
        )


def data_of(tokenizer: str | Path, prior: str | Path) -> dict[str, str]:
    """What the card of a converted pipeline says of its data."""
    return {
        "name": f"the training data of {Path(prior).name} and {Path(tokenizer).name}",
        "attribution": "that of the files this model was converted from, and of their training data.",
    }


def require(state: StateDict, keys: tuple[str, ...], what: str) -> None:
    """Raise UserError unless `state` has all of `keys`."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise UserError(f"a {what} file must be complete, this one lacks what becomes {missing}. Pass the whole file.")


def indexed(state: StateDict, pattern: str) -> list[Tensor]:
    """Tensors whose key matches, ordered by the number in the first group."""
    found = {int(m.group(1)): state[key] for key in state if (m := re.fullmatch(pattern, key))}
    return [found[i] for i in sorted(found)]
