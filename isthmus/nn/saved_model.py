"""What every model and scheduler here can do: say its arguments, be written to a folder, and be read back strictly.

The folder is laid out as diffusers lays out a component. Importing its base classes would take several times as long
as importing torch.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from isthmus.errors import UserError
from isthmus.nn.component_files import CONFIG, DIFFUSERS_WEIGHTS, read_config, remembered, stored_shapes, weight_files

AnyRecorded = TypeVar("AnyRecorded", bound="Recorded")
AnyModel = TypeVar("AnyModel", bound="SavedModel")
Constructor = TypeVar("Constructor", bound=Callable[..., None])

SCHEDULER_CONFIG = "scheduler_config.json"


class _NormalsLeftOut(TorchFunctionMode):
    """Leaves normal_ out, which on the meta device loads torch's compiler: that takes longer than torch itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_ or func is Tensor.normal_:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Networks made or loaded inside have shapes and no values (meta device): for sizes, or for weights that follow."""
    with torch.device("meta"), _NormalsLeftOut():
        yield


def values_left_out() -> bool:
    """Whether we are inside `without_values`."""
    return torch.empty(0).is_meta


class Config(dict[str, Any]):
    """The arguments something was made with, as entries and attributes; they cannot be changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no argument {name!r}") from None

    def __setitem__(self, name: str, value: Any = None) -> NoReturn:
        raise TypeError(f"arguments are recorded once, {name} cannot be changed")

    __setattr__ = __delitem__ = __setitem__

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return Config, (dict(self),)


def records_arguments(constructor: Constructor) -> Constructor:
    """Decorator of `__init__`: keep its arguments, defaults included, as `self.config`."""
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        # torch's modules accept plain attributes before their own constructor has run
        self.config = Config({name: value for name, value in bound.arguments.items() if name != "self"})
        constructor(self, *args, **kwargs)

    return recording  # pyright: ignore[reportReturnType]  the same signature


class Recorded:
    """Something whose recorded arguments (`config`) are all there is to know of it; schedulers are nothing more.

    Attributes:
        later_arguments: those that came after folders of this class were written, and the values that they had before
            they existed. At these they are left out of the folder and of the fingerprint.
    """

    config_name: ClassVar[str] = SCHEDULER_CONFIG
    later_arguments: ClassVar[Mapping[str, Any]] = {}
    config: Config

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the arguments, with the name of the class."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        later = self.later_arguments
        known = {name: value for name, value in self.config.items() if name not in later or value != later[name]}
        values = {"_class_name": type(self).__name__, **known}
        (folder / self.config_name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load_config(cls, folder: str | Path) -> dict[str, Any]:
        """The arguments that a folder holds for this class; UserError where it holds none, or others."""
        folder = Path(folder)
        config = read_config(folder, cls.config_name)
        check_class(config.get("_class_name"), cls.__name__, folder)
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        check_settings(settings, cls, folder / cls.config_name)
        return settings

    @classmethod
    def from_pretrained(cls: type[AnyRecorded], folder: str | Path) -> AnyRecorded:
        """What was saved in a folder; UserError as `load_config`."""
        return cls(**cls.load_config(folder))


class SavedModel(nn.Module, Recorded):
    """Base of the networks: a module whose constructor arguments are its configuration (`records_arguments`).

    A constructor never computes from the values of parameters, and fills them only where they have values: it also runs
    on the meta device (`without_values`).
    """

    config_name: ClassVar[str] = CONFIG
    gradient_checkpointing: bool = False
    read_from: "ReadFrom | None" = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory in training: what blocks hold inside is computed once more in the backward pass."""
        self.gradient_checkpointing = True

    def run_block(self, block: nn.Module, *arguments: Any) -> Any:
        """`block(*arguments)`, in training with `gradient_checkpointing` without keeping what is inside."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def save_pretrained(self, save_directory: str | Path, *, max_shard_size: int | str | None = None) -> None:
        """Write config.json and the weights, in files of at most `max_shard_size` (bytes, or "2GB"; None: 10 GB)."""
        super().save_pretrained(save_directory)
        # safetensors stores rows as they are read: weights of convolutions may lie channels-last
        state = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        stem, suffix = DIFFUSERS_WEIGHTS.rsplit(".", 1)
        save_torch_state_dict(
            state,
            save_directory,
            filename_pattern=f"{stem}{{suffix}}.{suffix}",
            max_shard_size="10GB" if max_shard_size is None else max_shard_size,
        )

    @classmethod
    def from_pretrained(cls: type[AnyModel], folder: str | Path, *, dtype: torch.dtype | None = None) -> AnyModel:
        """The model saved in a folder, in eval mode on the CPU; its shapes alone inside `without_values`.

        `dtype` None keeps the stored type. Raises UserError, before any weight is read, where the folder is incomplete
        or does not fit the class.
        """
        folder = Path(folder)
        settings = cls.load_config(folder)
        with without_values():
            model = cls(**settings)
        check_shapes(shapes_of(model.state_dict()), stored_shapes(folder), folder)
        if values_left_out():
            return model.to(dtype).eval()
        files = weight_files(folder)
        state = read_weights(files, folder)
        if dtype is not None:
            state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        model.load_state_dict(state, assign=True)
        model.read_from = ReadFrom.now((folder / CONFIG, *files), model.state_dict())
        return model.eval()


@dataclass(frozen=True)
class ReadFrom:
    """Files that hold a network's configuration and weights, and marks of the weights as they were read.

    A mark is where a tensor lies and how often it was changed in place: torch counts that, but for changes of `.data`.
    """

    files: tuple[Path, ...]
    marks: Mapping[str, tuple[int, int]]

    @classmethod
    def now(cls, files: Sequence[Path], state: Mapping[str, Tensor]) -> "ReadFrom | None":
        """Of weights that were just read; None where torch does not count their changes."""
        if any(tensor.is_inference() for tensor in state.values()):
            return None
        return cls(tuple(files), {name: (tensor.data_ptr(), tensor._version) for name, tensor in state.items()})

    def still_holds(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the files hold these weights: none was changed, cast or moved since."""
        if any(tensor.is_inference() for tensor in state.values()):
            return False
        return self.marks == {name: (tensor.data_ptr(), tensor._version) for name, tensor in state.items()}


def read_weights(files: Sequence[Path], folder: Path) -> dict[str, Tensor]:
    """All weights of safetensors files, mapped into memory; UserError as `check_finite`."""
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)

    def check() -> str:
        check_finite(state, folder)
        return "finite"

    # of large files it is known from before: a weight that is not used is then not read
    remembered("finite", files, check)
    return state


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UserError where a weight is NaN or infinite: what is drawn with it looks like a picture and is none."""
    # a sum is finite only where all its terms are, and reads every weight once; other sums may just be too large
    broken = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())) and not torch.isfinite(tensor).all()
    ]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"weights must be finite, got NaN or infinity in {broken[0]}{more} of {source}. Its training diverged, or "
            "the file was damaged: take an earlier checkpoint of it, or another copy."
        )


def check_class(found: Any, name: str, folder: Path) -> None:
    """Raise UserError where the class that a folder names is not the one of this name."""
    if found != name:
        raise UserError(f"{folder} must hold a {name}, got {found}. Pass another model.")


def check_settings(settings: Mapping[str, Any], kind: type, source: Path) -> None:
    """Raise UserError where a name in `settings` is no argument of the constructor of `kind`."""
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UserError(
            f"{source} has settings that {kind.__name__} does not know: {', '.join(unknown[:4])}. "
            "It was edited, or written by another version: update Isthmus."
        )


def check_shapes(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise UserError unless a folder holds exactly the weights that its network has."""
    if problems := misfits(expected, stored):
        raise UserError(f"the weights in {folder} do not fit its config.json: {problems}.")


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Which weights are missing, unexpected or of another shape, the first four in words; "" where all fit.

    >>> misfits({"a": (1,), "b": (2,)}, {"b": (3,)})
    'missing a; b is (3,), expected (2,)'
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    return "; ".join(problems[:4]) + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
