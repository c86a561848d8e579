"""`isthmus info`: what a model is, on what terms the built-in images come, which runs have names. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from isthmus.cli.options import parse
from isthmus.errors import UserError
from isthmus.registry import DESCRIPTIONS, imported


@dataclass(frozen=True, kw_only=True)
class Info:
    """What a model is, from its files alone; or `data` (licences of the built-in images) or `presets`."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|data|presets")]
    """A pipeline folder or hub id, or one of the words data and presets."""
    card: bool = False
    """Print the card and the files of the model: exactly what an upload would send. Sends nothing."""


def run(arguments: Sequence[str]) -> None:
    """Print what is asked for."""
    command = parse(Info, arguments, prog="isthmus info")
    if command.card and command.what in ("data", "presets"):
        raise UserError(f"only a model has a card, got {command.what}. Pass a pipeline folder.")
    if command.what == "data":
        from isthmus.data.licences import ATTRIBUTIONS

        print(_listing(ATTRIBUTIONS))
    elif command.what == "presets":
        print(describe_presets())
    else:
        # imported here: the hub's client takes a moment
        from isthmus.pipelines.folder import model_folder

        folder = model_folder(command.what)
        print(upload_contents(folder) if command.card else describe_model(folder))


def describe_model(folder: Path) -> str:
    """Sizes, classes, token layout, parameter counts and defaults of a pipeline folder."""
    from isthmus.nn.component_files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, stored_shapes
    from isthmus.pipelines.folder import read_index
    from isthmus.pipelines.labels import listed_names, names_in_order

    index = read_index(folder)
    names = names_in_order(index["class_names"])
    about = DESCRIPTIONS.get(index["_class_name"])
    if about is None:
        raise UserError(f"{folder} holds a {index['_class_name']}, which this version does not know. Update Isthmus.")
    rows, num_classes = imported(about)(folder)
    for name in _components(index):
        if name in ("scheduler", "text_tokenizer"):  # no weights
            continue
        weights = TRANSFORMERS_WEIGHTS if index[name][0] == "transformers" else DIFFUSERS_WEIGHTS
        shapes = stored_shapes(folder / name, weights).values() if name != "text_encoder" else _encoder_shapes(folder)
        count = sum(math.prod(shape) for shape in shapes)
        rows[name] = f"{count / 1e6:.2f}M parameters" + (f", {rows[name]}" if name in rows else "")
    classes = str(num_classes) if num_classes else "none (unlabelled)"
    rows |= {
        "written by": f"Isthmus {index['isthmus_version']} (format {index['isthmus_format']})",
        "classes": classes + (f": {listed_names(names)}{' ...' if len(names) > 20 else ''}" if names else ""),
        "defaults": ", ".join(f"{k} {_plain(v)}" for k, v in index["sampling_defaults"].items()),
        "data": index["data"].get("name") or "unknown",
        "licence": index["data"].get("attribution") or "unknown",
    }
    return _listing(rows)


def _encoder_shapes(folder: Path) -> list[tuple[int, ...]]:
    """Shapes of the weights of a text encoder: its own, or those of the networks of transformers that it is made of."""
    from isthmus.nn.component_files import CONFIG, DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, read_json, stored_shapes

    place = folder / "text_encoder"
    networks = read_json(place / CONFIG).get("networks")
    if networks is None:
        return list(stored_shapes(place, DIFFUSERS_WEIGHTS).values())
    parts = [place / f"network_{number + 1}" for number in range(len(networks))]
    return [shape for part in parts for shape in stored_shapes(part, TRANSFORMERS_WEIGHTS).values()]


def _components(index: Mapping[str, Any]) -> list[str]:
    """Names of the components of a pipeline folder that are read: entries [library, class]."""
    from isthmus.pipelines.folder import FORGOTTEN

    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return [name for name, value in pairs.items() if value != [None, None] and name not in FORGOTTEN]


def upload_contents(folder: Path) -> str:
    """The card, then every file an upload would send with its size."""
    from isthmus.pipelines.folder import read_index

    index = read_index(folder)
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md. Load the model and save it again: that writes the card.")
    parts = [folder / "README.md", folder / "model_index.json"]
    parts += [folder / "null_text.safetensors"]  # of models that read text
    parts += [path for name in _components(index) for path in sorted((folder / name).rglob("*"))]
    files = "\n".join(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}" for path in parts if path.is_file())
    return f"{(folder / 'README.md').read_text(encoding='utf-8')}\nFiles (bytes):\n{files}\n\nNothing was sent."


def describe_presets() -> str:
    """Every preset with its size, and what its authors report."""
    from isthmus.dar.runs import DIFFUSION_TOKENIZER_PRESETS, NEXT_TOKEN_PRIOR_PRESETS
    from isthmus.next_scale.runs import DISTILL_PRESETS, PRIOR_PRESETS, TOKENIZER_PRESETS
    from isthmus.training.config import Preset

    parts = []
    listed: dict[str, Mapping[str, Preset[Any]]] = {
        "train tokenizer": {**TOKENIZER_PRESETS, **DIFFUSION_TOKENIZER_PRESETS},
        "train prior": {**PRIOR_PRESETS, **NEXT_TOKEN_PRIOR_PRESETS},
        "distill": {**DISTILL_PRESETS},
    }
    for title, presets in listed.items():
        rows = {}
        for name, preset in presets.items():
            size = f" {preset.expected_params_millions:g}M parameters." if preset.expected_params_millions else ""
            fid = f" Reported FID {preset.reported_fid:g} ({preset.source})." if preset.reported_fid else ""
            rows[name] = f"{preset.about}.{size}{fid}"
        parts.append(f"isthmus {title} --preset NAME\n" + _listing(rows, indent="  "))
    return "\n\n".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['kind']} {value['start']:g} to {value['end']:g}"
    return "off" if value is None or value is False else str(value)


def _listing(rows: Mapping[str, str], indent: str = "") -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"{indent}{name:<{width}}{text}" for name, text in rows.items())
