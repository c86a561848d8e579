"""Editing: generation in which some tokens are those of a source image. Any next-scale model can, without training.

Sources: Tian et al., "Visual Autoregressive Modeling", zero-shot editing (spec of VAR, 2.8); Kumar et al., "Scale-Wise
VAR is Secretly Discrete Diffusion" (zero-shot tasks); Lugmayr et al., "RePaint" (the jumps; spec of SRDD, 3.2).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeVar, get_args

import torch

from isthmus.errors import UserError
from isthmus.next_scale.canvas import KeptTokens, Mask, kept_as_published, kept_by_coverage
from isthmus.next_scale.options import Keeping
from isthmus.next_scale.pyramid import Scale, ScaleSchedule
from isthmus.next_scale.sampling import ScaleSampler
from isthmus.next_scale.tokenizer import MultiScaleVQVAE, latents_of
from isthmus.nn.shapes import FeatureMap, Images, LatentMap, ScaleTokens, TokenPyramid
from isthmus.pipelines.labels import whole_number

_Value = TypeVar("_Value")

DEFAULT_MAX_UNKNOWN = 0.5
DEFAULT_JUMP_SCALES = 2


@dataclass(frozen=True)
class KnownPart:
    """What an edit takes from its source: per scale, which tokens (`kept`), and which codes these are.

    `token_ids`, called with (scale, features so far), returns the source's tokens of that scale; those that are not
    kept do not matter.
    """

    kept: KeptTokens
    token_ids: Callable[[int, LatentMap], ScaleTokens]


@dataclass(frozen=True)
class Jumps:
    """Simple resampling: how often, and how far, an edit goes back.

    After a scale n, the features are quantised again, the tokens of all but the last `num_scales` (>= 1) scales up to n
    are those found (the tokens an edit keeps stay the source's), and these last scales are drawn anew, with random
    numbers of their own. What the coarse scales say thus learns from the finer ones that were drawn under them.

    `per_scale` has the number of jumps after each scale. The first `num_scales` scales have none: a jump from there
    would keep nothing.
    """

    per_scale: tuple[int, ...]
    num_scales: int = 2

    def __post_init__(self):
        if any(count < 0 for count in self.per_scale):
            raise UserError(f"jumps must not be negative, got {self.per_scale}. 0 is none.")
        if self.num_scales < 1:
            raise UserError(f"jump_scales must be at least 1 (scales drawn anew), got {self.num_scales}.")
        if any(self.per_scale[: self.num_scales]):
            raise UserError(
                f"a jump over {self.num_scales} scales must keep at least the first one, got jumps {self.per_scale}. "
                f"Start at scale {self.num_scales} (from 0), or lower jump_scales."
            )

    @classmethod
    def of(cls, jumps: int | Sequence[int], jump_scales: int | None, num_scales: int) -> "Jumps":
        """One number for every scale from which a jump leaves a scale before it as it is, or one number per scale.

        `jump_scales` None is 2. Raises UserError where a number is out of range, `jump_scales` is given without jumps,
        or there are no scales to jump from.

        >>> Jumps.of(2, 1, 3)
        Jumps(per_scale=(0, 2, 2), num_scales=1)
        """
        back = DEFAULT_JUMP_SCALES if jump_scales is None else jump_scales
        if isinstance(jumps, int):
            per_scale = tuple(jumps if scale >= back else 0 for scale in range(num_scales)) if jumps >= 0 else (jumps,)
        else:
            per_scale = tuple(jumps)
            if len(per_scale) != num_scales:
                raise UserError(f"jumps is one number, or one per scale ({num_scales}), got {len(per_scale)}.")
        asked = jumps != 0 if isinstance(jumps, int) else any(per_scale)
        if jump_scales is not None and not asked:
            raise UserError(
                f"jump_scales says how far a jump goes back, got {jump_scales} without jumps. Leave it out."
            )
        made = cls(per_scale, back)
        if asked and not any(per_scale):
            raise UserError(
                f"a jump over {back} scales must keep at least the first of {num_scales}, so there is none to make. "
                "Lower jump_scales."
            )
        return made


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
    """What an edit keeps of images.

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

    Raises UserError where a value is out of range, `max_unknown` is given to "published", or there are several images
    and another number of results.
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
    if len(images) not in (1, rows):
        raise UserError(f"an edit of {rows} results takes one image or {rows}, got {len(images)}.")
    kept = [(one if scale < last else torch.zeros_like(one)).expand(rows, -1) for scale, one in enumerate(kept)]
    latents = latents_of(image_tokenizer, images)
    if keeping == "published":
        with torch.no_grad():
            found = image_tokenizer.requantize(latents, schedule)
        return KnownPart(kept, tokens_as_they_are([ids.expand(rows, -1) for ids in found]))
    latents = latents.expand(rows, -1, -1, -1)
    return KnownPart(kept, lambda scale, features: image_tokenizer.nearest_tokens(latents - features, sizes[scale]))


def tokens_as_they_are(token_ids: TokenPyramid) -> Callable[[int, LatentMap], ScaleTokens]:
    """The tokens of a pyramid, whatever the features so far."""
    return lambda scale, features: token_ids[scale]


def edit_scales(
    image_tokenizer: MultiScaleVQVAE, sampler: ScaleSampler, known: KnownPart, jumps: Jumps | None = None
) -> Iterator[Scale]:
    """Draw every scale, coarse to fine, but for the tokens that are kept.

    A scale that is kept whole is not predicted, unless the model is causal and its keys are needed later. After a jump
    (None: no jumps) a scale comes again: its last visit counts.
    """
    loop = _EditLoop(image_tokenizer, sampler, known)
    jumps = jumps or Jumps((0,) * sampler.schedule.num_scales)
    for state in _visits(loop, jumps):
        # copied out of inference mode: a caller may go on computing with them
        yield Scale(state.index, state.token_ids.clone(), state.features.clone())


def _visits(loop: "_EditLoop", jumps: Jumps) -> Iterator[Scale]:
    for scale, count in enumerate(jumps.per_scale):
        yield loop.visit(scale)
        for _ in range(count):
            first = scale + 1 - jumps.num_scales
            yield from loop.quantized_again(loop.states[scale + 1], first)
            for again in range(first, scale + 1):
                yield loop.visit(again)


class _EditLoop:
    """One edit as it stands.

    `states[k + 1]` are the features after scale k. `rounds` counts how often each scale was drawn, which is the round
    of its next random numbers.
    """

    def __init__(self, image_tokenizer: MultiScaleVQVAE, sampler: ScaleSampler, known: KnownPart):
        num_scales = sampler.schedule.num_scales
        self.tokenizer, self.sampler, self.known = image_tokenizer, sampler, known
        self.kept = [kept.to(image_tokenizer.device) for kept in known.kept]
        self.keeps = [bool(kept.any()) for kept in known.kept]
        draws = [not bool(kept.all()) for kept in known.kept]
        # a causal model reads the keys of every scale before one that is drawn
        self.predicts = [draws[k] or (sampler.has_cache and any(draws[k:])) for k in range(num_scales)]
        self.states, self.rounds = [sampler.start()] * (num_scales + 1), [0] * num_scales
        self.token_ids: list[ScaleTokens] = [torch.empty(0, 0, dtype=torch.long)] * num_scales

    @torch.inference_mode()
    def visit(self, scale: int) -> Scale:
        """Draw a scale from the features before it, with the kept tokens in their places."""
        features, kept = self.states[scale], self.kept[scale]
        if not self.predicts[scale]:
            source = self.known.token_ids(scale, features)
            return self._add(scale, source, self.tokenizer.lookup(source))
        drawn = self.sampler.draw(scale, self.sampler.predict(scale, features), round_index=self.rounds[scale])
        self.rounds[scale] += 1
        if not self.keeps[scale]:
            return self._add(scale, drawn.token_ids, drawn.codes)
        source = self.known.token_ids(scale, features)
        kept_map = kept.view(len(kept), 1, *drawn.codes.shape[-2:])
        codes = torch.where(kept_map, self.tokenizer.lookup(source), drawn.codes)
        return self._add(scale, torch.where(kept, source, drawn.token_ids), codes)

    @torch.inference_mode()
    def quantized_again(self, features: LatentMap, num_scales: int) -> list[Scale]:
        """The first scales as the tokens found in `features`, kept tokens being the source's."""
        # a mixture of codes is replaced by a code, so the features change even where the token comes back
        scales, changed, mixed = [], False, self.sampler.options.smooth
        for scale in range(num_scales):
            before = self.states[scale]
            if changed and self.sampler.has_cache and self.predicts[scale]:
                self.sampler.predict(scale, before)  # for its keys, which follow from the tokens before it
            token_ids = self.tokenizer.nearest_tokens(features - before, self.sampler.schedule.sizes[scale])
            if self.keeps[scale]:
                token_ids = torch.where(self.kept[scale], self.known.token_ids(scale, before), token_ids)
            changed = changed or mixed or not torch.equal(token_ids, self.token_ids[scale])
            scales.append(self._add(scale, token_ids, self.tokenizer.lookup(token_ids)))
        return scales

    def _add(self, scale: int, token_ids: ScaleTokens, codes: FeatureMap) -> Scale:
        self.token_ids[scale] = token_ids
        self.states[scale + 1] = self.sampler.add(scale, self.states[scale], codes)
        return Scale(scale, token_ids, self.states[scale + 1])


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

    Raises:
        UserError: two inputs have different numbers, neither being 1.

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
