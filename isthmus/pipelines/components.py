"""Components of a pipeline folder, loaded strictly: every setting known, every weight there, none too many."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from isthmus.errors import UserError
from isthmus.pipelines.folder import TRANSFORMERS_WEIGHTS, read_config, stored_shapes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Model = TypeVar("Model", bound=ModelMixin)
Scheduler = TypeVar("Scheduler", bound=SchedulerMixin)

SCHEDULER_CONFIG = "scheduler_config.json"
# what transformers writes beside the settings of the network, and what a prior of ours adds
_LLAMA_EXTRAS = {"architectures", "codebook_size", "dtype", "model_type", "transformers_version"}


def load_component(kind: type[Model], folder: Path, *, dtype: torch.dtype | None = None) -> Model:
    """A model from its folder, in eval mode on the CPU.

    diffusers only warns about unknown settings and missing weights; here both are errors, found from the headers
    of the files before anything is loaded.

    Raises:
        UserError: the folder is incomplete, or its settings or weights do not fit the class.
    """
    check_component(kind, folder)
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def load_scheduler(kind: type[Scheduler], folder: Path, *, dtype: torch.dtype | None = None) -> Scheduler:
    """A scheduler from its folder; it has no weights, so `dtype` changes nothing.

    Raises:
        UserError: the folder is incomplete, or its settings do not fit the class.
    """
    config = read_config(folder, SCHEDULER_CONFIG)
    _check_class(config.get("_class_name"), kind, folder)
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    check_settings(settings, kind, folder / SCHEDULER_CONFIG)
    return kind(**settings)


def load_llama(kind: "type[LlamaForCausalLM]", folder: Path, *, dtype: torch.dtype | None = None) -> "LlamaForCausalLM":
    """A stock Llama from its folder, in eval mode on the CPU, as strictly as our own models.

    Raises:
        UserError: the folder is incomplete, or its settings or weights do not fit a Llama.
    """
    # imported here: the other family does without
    from transformers import LlamaConfig
    from transformers import __version__ as installed

    config = read_config(folder)
    _check_class(next(iter(config.get("architectures") or ()), None), kind, folder)
    unknown = sorted(set(config) - set(LlamaConfig().to_dict()) - _LLAMA_EXTRAS)
    # another version of transformers may know other settings; with the same one the file was edited
    if unknown and config.get("transformers_version") == installed:
        raise UserError(f"{folder / 'config.json'} has settings that a Llama does not know: {', '.join(unknown[:4])}.")
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in kind(LlamaConfig.from_dict(config)).state_dict().items()}
    _check_shapes(expected, stored_shapes(folder, TRANSFORMERS_WEIGHTS), folder)
    with no_progress_bars():
        return kind.from_pretrained(
            folder, dtype=dtype or torch.float32, use_safetensors=True, local_files_only=True
        ).eval()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the bars that transformers shows for every file it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_component(kind: type[ModelMixin], folder: Path) -> None:
    """Raise UserError unless `folder` holds exactly the settings and weights of `kind`."""
    config = read_config(folder)
    _check_class(config.get("_class_name"), kind, folder)
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    check_settings(settings, kind, folder / "config.json")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in kind(**settings).state_dict().items()}
    _check_shapes(expected, stored_shapes(folder), folder)


def _check_class(found: Any, kind: type, folder: Path) -> None:
    if found != kind.__name__:
        raise UserError(f"{folder} must hold a {kind.__name__}, got {found}. Pass another model.")


def _check_shapes(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], folder: Path) -> None:
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
