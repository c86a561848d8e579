"""One seed per image: which stream of random numbers every image of a request draws from."""

from collections.abc import Sequence

import numpy as np
import torch

from isthmus.errors import UserError

_SEED_BITS = 63


def image_seeds(
    num_images: int,
    *,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    image_index: int | Sequence[int] = 0,
) -> list[tuple[int, int]]:
    """One (seed, image index) per image; an image depends on its own pair only.

    One seed: image i draws from (seed, image_index + i), or from (seed, image_index[i]) where a list of numbers is
    given. A list of seeds: image i draws from (seed[i], 0). Generators only make that list, one 63-bit number per
    image: a single one makes all of them, a list makes one each. Nothing given: one fresh seed, which the result names.

    Raises:
        UserError: both a seed and a generator, a negative number, or a list of another length than `num_images`.

    >>> image_seeds(2, seed=7, image_index=3), image_seeds(2, seed=[7, 8])
    ([(7, 3), (7, 4)], [(7, 0), (8, 0)])
    """
    if seed is not None and generator is not None:
        raise UserError("random numbers come from a seed or a generator, got both. Pass one of them.")
    if generator is not None:
        seed = _from_generators(generator, num_images)
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0]) >> (64 - _SEED_BITS)
    if isinstance(seed, int):
        indices = _per_image(image_index, num_images, "image_index")
        pairs = [(seed, index) for index in indices]
    else:
        if not isinstance(image_index, int) or image_index != 0:
            raise UserError("image_index belongs to a single seed, got it with one seed per image. Leave it out.")
        pairs = [(one, 0) for one in _checked_length(list(seed), num_images, "seed")]
    if any(one < 0 or index < 0 for one, index in pairs):
        raise UserError(f"seed and image_index must not be negative, got {min(pairs)}.")
    return pairs


def _per_image(index: int | Sequence[int], num_images: int, name: str) -> list[int]:
    if isinstance(index, int):
        return list(range(index, index + num_images))
    return _checked_length(list(index), num_images, name)


def _checked_length(values: list[int], num_images: int, name: str) -> list[int]:
    if len(values) != num_images:
        raise UserError(f"a list for {name} needs one number per image ({num_images}), got {len(values)}.")
    return values


def _from_generators(generator: torch.Generator | Sequence[torch.Generator], num_images: int) -> list[int]:
    if isinstance(generator, torch.Generator):
        return _draw(generator, num_images)
    if len(generator) != num_images:
        raise UserError(f"a list of generators needs one per image ({num_images}), got {len(generator)}.")
    return [_draw(one, 1)[0] for one in generator]


def _draw(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(2**_SEED_BITS - 1, (count,), generator=generator, device=generator.device).tolist()
