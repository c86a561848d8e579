"""What a call asks for: class ids, one seed per image, options; and the steps that every generation yields."""

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeVar, cast, get_args, get_type_hints

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from isthmus.errors import UserError, nearest
from isthmus.pictures import to_pil
from isthmus.pipelines.labels import Label, elements, whole_number
from isthmus.pipelines.options import OutputType, SamplingOptions, options_of
from isthmus.pipelines.prompts import Asked

Pictures = list[PIL.Image.Image] | np.ndarray | Tensor
"""Images as a pipeline returns them: PIL, numpy (b, h, w, 3) in [0, 1], torch (b, 3, h, w) in [0, 1] or features."""
Whole = SupportsIndex | Sequence[SupportsIndex] | Shaped[np.ndarray, "..."] | Shaped[torch.Tensor, "..."]
"""A whole number of any make, or one per image."""
Labels = Label | Sequence[Label] | Int[Tensor, "..."] | Shaped[np.ndarray, "..."]
"""Labels as a call takes them: one per image, or a single one."""
Generators = torch.Generator | Sequence[torch.Generator] | None

_SEED_BITS = 63
_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass
class GenerationStep:
    """One finished step of a generation, whatever the family: all that a server or a studio needs to know.

    Attributes:
        index: step, from 0 (next-scale models: the scale).
        total: number of steps.
        token_ids: (b, l), the tokens this step drew.
        preview: what the images look like so far; None where nobody asked for pictures.
    """

    index: int
    total: int
    token_ids: Int[Tensor, "b l"]
    preview: Pictures | None = None


@dataclass
class Request:
    """A call whose labels, prompts, seeds and options are known; (seed, image index) of every image."""

    asked: Asked
    seeds: list[tuple[int, int]]
    options: SamplingOptions
    output_type: OutputType

    @property
    def class_labels(self) -> list[int]:
        """Class id of every image; no class is the null class."""
        return self.asked.class_labels


def image_seeds(
    num_images: int,
    *,
    seed: object = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    image_index: object = 0,
) -> list[tuple[int, int]]:
    """One (seed, image index) per image; an image depends on its own pair only.

    One seed: image i draws from (seed, image_index + i), or from (seed, image_index[i]) where a list of numbers is
    given. A list of seeds: image i draws from (seed[i], 0). Generators only make that list, one 63-bit number per
    image: a single one makes all of them, a list makes one each. Nothing given: one fresh seed, which the result names.

    Seeds and numbers are whole numbers of any make, as are those in a list, an array or a tensor. Raises UserError for
    both a seed and a generator, a negative number or none at all, or a list of another length than `num_images`.

    >>> image_seeds(2, seed=7, image_index=3), image_seeds(2, seed=[7, 8])
    ([(7, 3), (7, 4)], [(7, 0), (8, 0)])
    """

    def one_each(values: list[Any], name: str) -> list[int]:
        if len(values) != num_images:
            raise UserError(f"a list for {name} needs one number per image ({num_images}), got {len(values)}.")
        return [whole_number(value, name) for value in values]

    if seed is not None and generator is not None:
        raise UserError("random numbers come from a seed or a generator, got both. Pass one of them.")
    if isinstance(generator, torch.Generator):
        seed = _numbers_from(generator, num_images)
    elif generator is not None:
        if len(generator) != num_images:
            raise UserError(f"a list of generators needs one per image ({num_images}), got {len(generator)}.")
        seed = [number for one in generator for number in _numbers_from(one, 1)]
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) >> (64 - _SEED_BITS)
    seeds, indices = elements(seed), elements(image_index)
    if seeds is not None:
        if indices is not None or whole_number(image_index, "image_index") != 0:
            raise UserError("image_index belongs to a single seed, got it with one seed per image. Leave it out.")
        pairs = [(one, 0) for one in one_each(seeds, "seed")]
    else:
        one = whole_number(seed, "seed")
        first = 0 if indices is not None else whole_number(image_index, "image_index")
        numbers = range(first, first + num_images) if indices is None else one_each(indices, "image_index")
        pairs = [(one, index) for index in numbers]
    if any(one < 0 or index < 0 for one, index in pairs):
        raise UserError(f"seed and image_index must not be negative, got {min(pairs)}.")
    return pairs


def _numbers_from(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**_SEED_BITS - 1, (count,), generator=generator, device=generator.device).tolist()


def takes(kind: type) -> Callable[[_Method], _Method]:
    """Decorator of a method with `**options: Unpack[kind]`: it is called with every option of the typed dictionary.

    Those that are not given have their default. `inspect.signature` and `help` show all of them, with what the line
    `options:` of the docstring says in its place. An option that the method does not know is a TypeError that names the
    nearest.
    """
    declared = options_of(kind)
    defaults = {name: option.default for name, option in declared.items()}

    def decorate(method: _Method) -> _Method:
        written = inspect.signature(method)
        *own, _ = written.parameters.values()
        hints = get_type_hints(kind, localns=globals() | vars(sys.modules[method.__module__]))
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [inspect.Parameter(name, keyword, default=defaults[name], annotation=hints[name]) for name in declared]
        known = {parameter.name for parameter in own} | declared.keys()

        @functools.wraps(method)
        def with_all(self: Any, *arguments: Any, **given: Any) -> Any:
            for name in given:
                if name not in known:
                    raise TypeError(f"{method.__name__} has no option {name}.{nearest(name, known)}")
            return method(self, *arguments, **{**defaults, **given})

        cast(Any, with_all).__signature__ = written.replace(parameters=[*own, *added])
        lines = []
        for line in (method.__doc__ or "").split("\n"):
            if not line.strip().startswith("options:"):
                lines.append(line)
                continue
            indent = line[: len(line) - len(line.lstrip())]
            for name, option in declared.items():
                entry = f"{name}: {option.documentation}"
                lines += textwrap.wrap(entry, 120, initial_indent=indent, subsequent_indent=indent + "    ")
        with_all.__doc__ = "\n".join(lines)
        return cast(_Method, with_all)

    return decorate


def check_output_type(output_type: OutputType) -> None:
    """Raise UserError unless `output_type` is one of `OutputType`."""
    if output_type not in get_args(OutputType):
        raise UserError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}.")


def spread(ids: list[int], num_images: SupportsIndex | None, num_images_per_class: SupportsIndex) -> list[int]:
    """Class id of every image of a request; UserError for no label, no image, or both numbers.

    >>> spread([4, 2], None, 2), spread([4, 2], 3, 1)
    ([4, 4, 2, 2], [4, 2, 4])
    """
    if not ids:
        raise UserError("at least one class label is needed, got an empty list. Pass None for images without a class.")
    num_images_per_class = whole_number(num_images_per_class, "num_images_per_class")
    num_images = None if num_images is None else whole_number(num_images, "num_images")
    if num_images_per_class < 1 or (num_images is not None and num_images < 1):
        raise UserError(f"at least one image is needed, got {num_images} and {num_images_per_class} per class.")
    if num_images is None:
        return [one for one in ids for _ in range(num_images_per_class)]
    if num_images_per_class != 1:
        raise UserError("num_images is the number of all images, got num_images_per_class as well. Pass one of them.")
    return [ids[i % len(ids)] for i in range(num_images)]


def as_output(images: Float[Tensor, "b 3 h w"], output_type: OutputType) -> Pictures:
    """Images in [-1, 1] in the form asked for: PIL, or numpy or torch in [0, 1]; "latent" gives them unclamped."""
    if output_type == "latent":
        return images
    if output_type == "pil":
        return to_pil(images)
    scaled = images.float().add(1).div(2).clamp(0, 1)
    return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).cpu().numpy()
