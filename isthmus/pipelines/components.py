"""Components of a pipeline folder, loaded strictly: every setting known, every weight there, none too many."""

import inspect
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin

from isthmus.errors import UserError
from isthmus.pipelines.folder import read_config, stored_shapes

Model = TypeVar("Model", bound=ModelMixin)


def load_component(kind: type[Model], folder: Path, *, dtype: torch.dtype | None = None) -> Model:
    """A model from its folder, in eval mode on the CPU.

    diffusers only warns about unknown settings and missing weights; here both are errors, found from the headers
    of the files before anything is loaded.

    Raises:
        UserError: the folder is incomplete, or its settings or weights do not fit the class.
    """
    check_component(kind, folder)
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def check_component(kind: type[ModelMixin], folder: Path) -> None:
    """Raise UserError unless `folder` holds exactly the settings and weights of `kind`."""
    config = read_config(folder)
    if config.get("_class_name") != kind.__name__:
        raise UserError(f"{folder} must hold a {kind.__name__}, got {config.get('_class_name')}. Pass another model.")
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    check_settings(settings, kind, folder / "config.json")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in kind(**settings).state_dict().items()}
    stored = stored_shapes(folder)
    problems = [f"missing {name}" for name in expected if name not in stored]
    problems += [f"unexpected {name}" for name in stored if name not in expected]
    problems += [
        f"{name} is {stored[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems[:4])}{more}.")


def check_settings(settings: dict[str, Any], kind: type, source: Path) -> None:
    """Raise UserError where a name in `settings` is no argument of the constructor of `kind`."""
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UserError(
            f"{source} has settings that {kind.__name__} does not know: {', '.join(unknown[:4])}. "
            "It was edited, or written by another version: update Isthmus."
        )
