"""Edits: what they keep of a source image, and how far they go back. Any next-scale model can, without training.

Sources: Tian et al., "Visual Autoregressive Modeling", zero-shot editing (spec of VAR, 2.8); Kumar et al., "Scale-Wise
VAR is Secretly Discrete Diffusion" (zero-shot tasks); Lugmayr et al., "RePaint" (the jumps; spec of SRDD, 3.2).
"""

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeVar, get_args

import torch

from isthmus.errors import UserError
from isthmus.next_scale.canvas import Mask, kept_as_published, kept_by_coverage
from isthmus.next_scale.options import Keeping
from isthmus.next_scale.pyramid import ScaleSchedule
from isthmus.next_scale.refinement import DEFAULT_JUMP_SCALES, KnownPart, ScaleRefinementScheduler
from isthmus.next_scale.tokenizer import MultiScaleVQVAE, latents_of
from isthmus.nn.shapes import Images
from isthmus.pipelines.labels import elements, whole_number

_Value = TypeVar("_Value")

DEFAULT_MAX_UNKNOWN = 0.5


def jumps_of(jumps: int | Sequence[int], jump_scales: int | None, num_scales: int) -> ScaleRefinementScheduler | None:
    """Simple resampling of an edit: one number of jumps per scale, or one for every scale that keeps some before it.

    What the coarse scales say thus learns from the finer ones that were drawn under them; kept tokens stay the
    source's. `jump_scales` None is 2; no jumps are None. Raises UserError where a number is out of range, `jump_scales`
    is given without jumps, or there are no scales to jump from.

    >>> jumps_of(2, 1, 3).rounds_of(3)
    (0, 2, 2)
    """
    back = DEFAULT_JUMP_SCALES if jump_scales is None else jump_scales
    given = elements(jumps)
    every = [whole_number(one, "jumps") for one in ([jumps] * num_scales if given is None else given)]
    if len(every) != num_scales or min(every) < 0:
        raise UserError(f"jumps is one number, or one per scale ({num_scales}), none negative, got {jumps}. 0 is none.")
    if not any(every):
        if jump_scales is not None:
            raise UserError(
                f"jump_scales says how far a jump goes back, got {jump_scales} without jumps. Leave it out."
            )
        return None
    if given is None:
        every[:back] = [0] * min(back, num_scales)  # a jump from there would keep nothing
    if not any(every):
        raise UserError(
            f"a jump over {back} scales must keep at least the first of {num_scales}, so there is none to make. "
            "Lower jump_scales."
        )
    return ScaleRefinementScheduler(mode="simple", rounds=every, jump_scales=back)


def known_part(
    image_tokenizer: MultiScaleVQVAE,
    schedule: ScaleSchedule,
    images: Images,
    mask: Mask,
    *,
    keeping: Keeping = "coverage",
    max_unknown: float | Sequence[float] | None = None,
    from_scale: int | None = None,
    num_results: int | None = None,
) -> KnownPart:
    """What an edit keeps of images; UserError where a value is out of range or means nothing beside the others.

    Args:
        schedule: scales of the model.
        images: in [-1, 1], of the tokenizer's size. What lies under the mask is read like the rest: fill it first
            (`fill_unknown`) where it is not to be seen.
        mask: (b, 1, h, w), 1 = unknown.
        keeping: "coverage" keeps a token with at most the share `max_unknown` of unknown pixels, and finds it anew from
            what the features so far leave of the image, so that what a drawn coarse token spills over known pixels is
            mended by finer ones. "published" is VAR's procedure: tokens of the image as they are, kept where the mask,
            resized bilinearly, says so; the 1 x 1 scale always.
        max_unknown: in [0, 1), one share for all scales or one per scale; None is one half. It belongs to "coverage".
        from_scale: nothing is kept from this scale on; None keeps on every scale.
        num_results: rows of the edit. A single image serves any number and is encoded once; None is one per image.
    """
    if keeping not in get_args(Keeping):
        raise UserError(f"keeping must be one of {', '.join(get_args(Keeping))}, got {keeping!r}.")
    if keeping == "published" and max_unknown is not None:
        raise UserError(
            f'keeping="published" has its own rule of which tokens are kept, got max_unknown={max_unknown}. Leave it '
            'out, or use keeping="coverage".'
        )
    shares = _shares(DEFAULT_MAX_UNKNOWN if max_unknown is None else max_unknown, schedule.num_scales)
    sizes, last = schedule.sizes, schedule.num_scales if from_scale is None else from_scale
    if not 0 <= last <= schedule.num_scales:
        raise UserError(f"from_scale must lie in 0..{schedule.num_scales} (the scales of the model), got {from_scale}.")
    kept = kept_by_coverage(mask, sizes, shares) if keeping == "coverage" else kept_as_published(mask, sizes)
    rows = len(images) if num_results is None else num_results
    kept = [(one if scale < last else torch.zeros_like(one)).expand(rows, -1) for scale, one in enumerate(kept)]
    latents = latents_of(image_tokenizer, images)
    if keeping == "published":
        with torch.no_grad():
            found = image_tokenizer.requantize(latents, schedule)
        return KnownPart(kept, lambda scale, features: found[scale].expand(rows, -1))
    latents = latents.expand(rows, -1, -1, -1)
    return KnownPart(kept, lambda scale, features: image_tokenizer.nearest_tokens(latents - features, sizes[scale]))


def _shares(max_unknown: float | Sequence[float], num_scales: int) -> tuple[float, ...]:
    shares = (max_unknown,) * num_scales if isinstance(max_unknown, (int, float)) else tuple(max_unknown)
    if len(shares) != num_scales or not all(0 <= share < 1 for share in shares):
        raise UserError(
            f"max_unknown is a share of pixels in [0, 1), one number or one per scale ({num_scales}), got "
            f"{max_unknown}. 0 keeps a token only where all its pixels are known."
        )
    return shares


def num_results(num_images: SupportsIndex | None, **given: Sequence[Any]) -> int:
    """How many results an edit has: the length of the longest input, or `num_images`; single inputs serve all.

    Raises UserError where two inputs have different numbers, neither being 1.

    >>> num_results(None, image=[0], mask=[0, 0])
    2
    """
    rows = max(map(len, given.values())) if num_images is None else whole_number(num_images, "num_images")
    if rows < 1:
        raise UserError(f"at least one image is needed, got num_images={num_images}.")
    for name, values in given.items():
        if len(values) not in (1, rows):
            raise UserError(f"an edit of {rows} image(s) takes one {name} or {rows}, got {len(values)}.")
    return rows


def one_each(values: Sequence[_Value], rows: int) -> list[_Value]:
    """One value per row, where there may be a single one for all."""
    return list(values) * rows if len(values) == 1 else list(values)
