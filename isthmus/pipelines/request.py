"""What a call asks for, made definite: class ids, seeds, options, and the form of the pictures that go back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from isthmus.errors import UserError
from isthmus.generation.options import SamplingOptions
from isthmus.generation.step import Pictures
from isthmus.pictures import to_pil
from isthmus.pipelines.labels import Label, whole_number

OutputType = Literal["pil", "np", "pt", "latent"]
Labels = Label | Sequence[Label] | Int[Tensor, "..."] | Shaped[np.ndarray, "..."]
"""Labels as a call takes them: one per image, or a single one."""
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class Request:
    """A call, made definite.

    Attributes:
        class_labels: class id of every image; the null class where none was asked for.
        seeds: (seed, image index) of every image.
        options: settings of the draw.
        output_type: form of the pictures.
    """

    class_labels: list[int]
    seeds: list[tuple[int, int]]
    options: SamplingOptions
    output_type: OutputType


def check_output_type(output_type: OutputType) -> None:
    """Raise UserError unless `output_type` is one of `OutputType`."""
    if output_type not in get_args(OutputType):
        raise UserError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}.")


def label_list(class_labels: object) -> list[Any]:
    """Labels as a list, whichever way they were given; `resolve_labels` says which of them are none."""
    if isinstance(class_labels, (Tensor, np.ndarray)):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, Iterable) and not isinstance(class_labels, (str, bytes)):
        return list(class_labels)
    return [class_labels]


def spread(ids: list[int], num_images: SupportsIndex | None, num_images_per_class: SupportsIndex) -> list[int]:
    """Class id of every image of a request.

    Raises:
        UserError: there is no label or no image, or both numbers are given.

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
