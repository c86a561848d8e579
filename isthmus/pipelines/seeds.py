"""One seed per image: which stream of random numbers every image of a request draws from."""

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Shaped

from isthmus.errors import UserError
from isthmus.pipelines.labels import whole_number

_SEED_BITS = 63

Whole = SupportsIndex | Sequence[SupportsIndex] | Shaped[np.ndarray, "..."] | Shaped[torch.Tensor, "..."]
"""A whole number of any make, or one per image."""


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

    Seeds and numbers are whole numbers of any make, as are those in a list, an array or a tensor.

    Raises:
        UserError: both a seed and a generator, a negative number or none at all, or a list of another length than
            `num_images`.

    >>> image_seeds(2, seed=7, image_index=3), image_seeds(2, seed=[7, 8])
    ([(7, 3), (7, 4)], [(7, 0), (8, 0)])
    """
    if seed is not None and generator is not None:
        raise UserError("random numbers come from a seed or a generator, got both. Pass one of them.")
    if generator is not None:
        seed = _from_generators(generator, num_images)
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) >> (64 - _SEED_BITS)
    several = _listed(seed)
    if several is None:
        one = whole_number(seed, "seed")
        pairs = [(one, index) for index in _per_image(image_index, num_images)]
    else:
        if _listed(image_index) is not None or whole_number(image_index, "image_index") != 0:
            raise UserError("image_index belongs to a single seed, got it with one seed per image. Leave it out.")
        pairs = [(one, 0) for one in _checked(several, num_images, "seed")]
    if any(one < 0 or index < 0 for one, index in pairs):
        raise UserError(f"seed and image_index must not be negative, got {min(pairs)}.")
    return pairs


def _listed(values: object) -> list[object] | None:
    """The elements of a list, an array or a tensor; None for a single value."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    return list(values) if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else None


def _per_image(index: object, num_images: int) -> list[int]:
    several = _listed(index)
    if several is not None:
        return _checked(several, num_images, "image_index")
    first = whole_number(index, "image_index")
    return list(range(first, first + num_images))


def _checked(values: list[object], num_images: int, name: str) -> list[int]:
    if len(values) != num_images:
        raise UserError(f"a list for {name} needs one number per image ({num_images}), got {len(values)}.")
    return [whole_number(value, name) for value in values]


def _from_generators(generator: torch.Generator | Sequence[torch.Generator], num_images: int) -> list[int]:
    if isinstance(generator, torch.Generator):
        return _draw(generator, num_images)
    if len(generator) != num_images:
        raise UserError(f"a list of generators needs one per image ({num_images}), got {len(generator)}.")
    return [_draw(one, 1)[0] for one in generator]


def _draw(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**_SEED_BITS - 1, (count,), generator=generator, device=generator.device).tolist()
