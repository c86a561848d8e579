"""`isthmus info`: what a model is, on what terms the built-in images come, which runs have names. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from isthmus.cli.parsing import parse
from isthmus.errors import UserError


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
        print(describe_data())
    elif command.what == "presets":
        print(describe_presets())
    else:
        # imported here: the hub's client takes a moment
        from isthmus.pipelines.hub import model_folder

        folder = model_folder(command.what)
        print(upload_contents(folder) if command.card else describe_model(folder))


def describe_model(folder: Path) -> str:
    """Sizes, classes, scales, parameter counts and defaults of a pipeline folder."""
    from isthmus.pipelines.folder import read_config, read_index, stored_shapes

    index = read_index(folder)
    tokenizer, prior = (read_config(folder / name) for name in ("image_tokenizer", "transformer"))
    counts = {
        name: sum(math.prod(shape) for shape in stored_shapes(folder / name).values())
        for name in ("image_tokenizer", "transformer")
    }
    names = list(index["class_names"].values())
    classes = str(prior["num_classes"]) if prior["num_classes"] else "none (unlabelled)"
    stride = 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    sizes = prior["scale_sizes"]
    rows = {
        "model": f"{index['_class_name']}, {prior['scale_attention']} over scales",
        "written by": f"Isthmus {index['isthmus_version']} (format {index['isthmus_format']})",
        "image size": f"{tokenizer['scale_sizes'][-1] * stride} px (stride {stride})",
        "scales": f"{', '.join(map(str, sizes))} ({sum(s * s for s in sizes)} tokens)",
        "codebook": f"{tokenizer['codebook_size']} codes of width {tokenizer['codebook_dim']}",
        "classes": classes + (f": {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}" if names else ""),
        "transformer": f"{_millions(counts['transformer'])}, width {prior['width']}, {prior['num_layers']} layers, "
        f"{prior['num_heads']} heads",
        "tokenizer": _millions(counts["image_tokenizer"]),
        "defaults": ", ".join(f"{k} {_plain(v)}" for k, v in index["sampling_defaults"].items()),
        "data": index["data"].get("name") or "unknown",
        "licence": index["data"].get("attribution") or "unknown",
    }
    return _listing(rows)


def upload_contents(folder: Path) -> str:
    """The card, then every file an upload would send with its size."""
    from isthmus.pipelines.folder import read_index

    read_index(folder)
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md. Load the model and save it again: that writes the card.")
    parts = [folder / "README.md", folder / "model_index.json"]
    parts += [path for name in ("image_tokenizer", "transformer") for path in sorted((folder / name).glob("*"))]
    files = "\n".join(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}" for path in parts if path.is_file())
    return f"{(folder / 'README.md').read_text(encoding='utf-8')}\nFiles (bytes):\n{files}\n\nNothing was sent."


def describe_data() -> str:
    """Licences and attribution of the built-in images."""
    from isthmus.data.licences import OPENMOJI_ATTRIBUTION, PHOTOS_ATTRIBUTION

    return _listing({"openmoji": OPENMOJI_ATTRIBUTION, "photos": PHOTOS_ATTRIBUTION})


def describe_presets() -> str:
    """Every preset with its size, and what its authors report."""
    from isthmus.presets import PRIOR_PRESETS, TOKENIZER_PRESETS

    parts = []
    for title, presets in (("train tokenizer", TOKENIZER_PRESETS), ("train prior", PRIOR_PRESETS)):
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


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M parameters"


def _listing(rows: Mapping[str, str], indent: str = "") -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"{indent}{name:<{width}}{text}" for name, text in rows.items())
