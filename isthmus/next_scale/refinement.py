"""The loop over scales of every draw and edit, which may draw tokens again before, or after, the next scale is drawn.

Sources: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion" (token resampling, simple and masked; numbers and
thresholds are ours: spec of SRDD, 3.2); Lugmayr et al., "RePaint" (the jumps). `ScaleRefinementScheduler` says what is
drawn again, `ScaleSampler` draws.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import Scale
from isthmus.next_scale.sampling import ScaleDraw, ScaleSampler
from isthmus.nn.precision import whole_fp32
from isthmus.nn.saved_model import Recorded, records_arguments
from isthmus.nn.shapes import FeatureMap, LatentMap, ScaleTokens

RefinementMode = Literal["none", "simple", "masked"]
DEFAULT_SHARE = 0.3
DEFAULT_JUMP_SCALES = 2


@dataclass(frozen=True)
class Forwards:
    """Predictions of a scale in one draw, rounds included: two numbers where they depend on what is drawn."""

    least: int
    most: int

    def __str__(self):
        return str(self.most) if self.least == self.most else f"{self.least} to {self.most}"


class ScaleRefinementScheduler(Recorded):
    """Rounds of redrawing per scale. It holds no state and no random numbers.

    Args:
        mode: "none" draws every token once. "masked" hides the least likely tokens of a scale after they are drawn and
            draws them again beside those that stay; a round costs one forward of its scale. "simple" jumps back: the
            features after a scale are quantised anew, all but the last `jump_scales` scales of that are kept and the
            others drawn again (RePaint's jump); a jump costs the forwards of the scales it repeats.
        rounds: one number per scale, coarse to fine, 0 for what is left out; None is one round at the second to fourth
            scale (simple: from the first scale that a jump can start from to the fourth). The first scale has no
            context and none.
        share: masked only: share of a scale's tokens that a round draws again, in (0, 1]; None is 0.3, where `p_min`
            does not say otherwise.
        p_min: masked only, instead of a share: tokens less probable than this are drawn again, in (0, 1).
        jump_scales: simple only: how many scales a jump repeats, the one it starts from included; None is 2.

    Raises UserError where an argument is out of its range or means nothing in this mode.

    >>> ScaleRefinementScheduler(mode="masked", rounds=(0, 2)).rounds_of(3)
    (0, 2, 0)
    """

    @records_arguments
    def __init__(
        self,
        *,
        mode: RefinementMode = "none",
        rounds: Sequence[int] | None = None,
        share: float | None = None,
        p_min: float | None = None,
        jump_scales: int | None = None,
    ):
        if mode not in get_args(RefinementMode):
            raise UserError(f"mode must be one of {', '.join(get_args(RefinementMode))}, got {mode!r}.")
        self.mode: RefinementMode = mode
        used = {"none": (), "simple": ("rounds", "jump_scales"), "masked": ("rounds", "share", "p_min")}[mode]
        for name in ("rounds", "share", "p_min", "jump_scales"):
            if self.config[name] is not None and name not in used:
                raise UserError(
                    f"mode {mode!r} has no {name}, got {self.config[name]}. Leave it out, or choose another mode."
                )
        if share is not None and p_min is not None:
            raise UserError(f"tokens are chosen by share or by p_min, got {share} and {p_min}. Pass one of them.")
        if p_min is not None and not 0 < p_min < 1:
            raise UserError(f"p_min is a probability in (0, 1), got {p_min}. Leave it out to choose by share.")
        if share is not None and not 0 < share <= 1:
            raise UserError(f"share must lie in (0, 1], got {share}. Use mode='none' to draw nothing again.")
        if jump_scales is not None and jump_scales < 1:
            raise UserError(f"jump_scales must be at least 1 (the scale the jump starts from), got {jump_scales}.")
        self.jump_scales = DEFAULT_JUMP_SCALES if jump_scales is None else jump_scales
        self.share = DEFAULT_SHARE if share is None else float(share)
        given = () if rounds is None else tuple(rounds)
        too_early = [scale for scale, count in enumerate(given[: self.jump_scales]) if mode == "simple" and count]
        if too_early:
            raise UserError(
                f"a jump over {self.jump_scales} scales must keep at least the first one, got a round at scale "
                f"{too_early[0]} (from 0). Start later, or lower jump_scales."
            )
        if any(not isinstance(count, int) or count < 0 for count in given) or (given and given[0]):
            raise UserError(
                f"rounds needs one number per scale, 0 or more, and 0 for the first scale, got {given}. "
                "For example 0,1,1,1."
            )

    @classmethod
    def load_config(cls, folder: str | Path) -> dict[str, Any]:
        """As `Recorded.load_config`; of the mode "critic" of earlier versions the same rounds by probability."""
        settings = super().load_config(folder)
        return settings | {"mode": "masked"} if settings.get("mode") == "critic" else settings

    def rounds_of(self, num_scales: int) -> tuple[int, ...]:
        """Rounds (or jumps) after every scale of a model; UserError for one at a scale it lacks, or none at all."""
        if self.mode == "none":
            return (0,) * num_scales
        given = self.config["rounds"]
        if given is None:
            first = self.jump_scales if self.mode == "simple" else 1
            given = [int(first <= scale < 4) for scale in range(num_scales)]
        if any(given[num_scales:]):
            raise UserError(
                f"rounds must be those of this model's {num_scales} scales, got {tuple(given)}, which has rounds for a "
                f"scale that does not exist. Leave out what lies beyond scale {num_scales - 1} (from 0)."
            )
        if not any(given):
            raise UserError(
                f"mode {self.mode!r} must draw some scale again, got no round on {num_scales} scale(s). Give rounds "
                "at scales that it has, or use mode 'none'."
            )
        return tuple(given[:num_scales]) + (0,) * (num_scales - len(given))

    def forwards_of(self, num_scales: int, *, has_cache: bool, smooth: bool) -> Forwards:
        """What a draw costs, whatever the batch it is part of; `has_cache` for a causal model.

        Two things depend on what is drawn: a round by `p_min` that finds no such token is left out, and a jump of a
        causal model reads the kept scales again where their tokens changed (with `smooth` always).

        >>> scheduler = ScaleRefinementScheduler(mode="simple")
        >>> str(scheduler.forwards_of(6, has_cache=False, smooth=False))
        '10'
        >>> str(scheduler.forwards_of(6, has_cache=True, smooth=False))
        '10 to 11'
        """
        rounds = self.rounds_of(num_scales)
        if self.mode != "simple":
            most = num_scales + sum(rounds)
            return Forwards(num_scales if self.config["p_min"] is not None else most, most)
        fixed = num_scales + self.jump_scales * sum(rounds)
        # a jump from `scale` keeps scale + 1 - jump_scales scales; the first of them reads none before it
        again = sum(count * (scale - self.jump_scales) for scale, count in enumerate(rounds)) if has_cache else 0
        return Forwards(fixed + again if smooth else fixed, fixed + again)

    def hidden_by_probability(self, probabilities: Float[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """What a masked round draws again, from guided probabilities at the draw's temperature, before filters."""
        p_min = self.config["p_min"]
        return probabilities < p_min if p_min is not None else lowest_share(probabilities, self.share)


def lowest_share(values: Float[Tensor, "b l"], share: float) -> Bool[Tensor, "b l"]:
    """The ceil(share * l) lowest values of every row; of equal ones the first go first.

    >>> lowest_share(torch.tensor([[0.5, 0.1, 0.9, 0.1]]), 0.25)
    tensor([[False,  True, False, False]])
    """
    # less a hair: 0.3 * 10 is 3 and must not count as 4 by rounding
    count = math.ceil(share * values.shape[1] - 1e-9)
    order = values.sort(dim=1, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order[:, :count], True)


KeptTokens = list[Bool[Tensor, "b _"]]
"""One entry per scale: which of its tokens an edit takes from the source."""


@dataclass(frozen=True)
class KnownPart:
    """What an edit takes from its source: per scale, which tokens (`kept`), and which codes these are.

    `token_ids`, called with (scale, features so far), returns the source's tokens of that scale; those that are not
    kept do not matter.
    """

    kept: KeptTokens
    token_ids: Callable[[int, LatentMap], ScaleTokens]


def refined_scales(
    sampler: ScaleSampler, scheduler: ScaleRefinementScheduler | None = None, known: KnownPart | None = None
) -> Iterator[Scale]:
    """Draw every scale, coarse to fine, with the rounds that `scheduler` asks for; None draws every token once.

    In an edit the tokens of `known` that are kept stay the source's; its rounds are jumps. A scale that is kept whole
    is not predicted, unless the model is causal and its keys are needed later.

    A scale comes when it is drawn, and after a jump once more where it has changed or was drawn again: the last one of
    an index counts. Raises UserError as `rounds_of`, at once.
    """
    scheduler = scheduler or ScaleRefinementScheduler()
    rounds = scheduler.rounds_of(sampler.schedule.num_scales)
    return _Loop(sampler, scheduler, known).scales(rounds)


def merged(old: ScaleDraw, new: ScaleDraw, hidden: Bool[Tensor, "b l"]) -> ScaleDraw:
    """`new` where hidden, `old` elsewhere."""
    chosen = hidden.reshape(len(hidden), 1, *old.codes.shape[-2:])
    return ScaleDraw(
        torch.where(hidden, new.token_ids, old.token_ids),
        torch.where(chosen, new.codes, old.codes),
        torch.where(hidden.unsqueeze(-1), new.logits, old.logits),
    )


class _Loop:
    """One draw or edit as it stands.

    `features[k]` are those before scale k; `visits` counts how often each scale was drawn, which is the round of its
    next random numbers.
    """

    def __init__(self, sampler: ScaleSampler, scheduler: ScaleRefinementScheduler, known: KnownPart | None):
        count, device = sampler.schedule.num_scales, sampler.tokenizer.device
        self.sampler, self.scheduler, self.known = sampler, scheduler, known
        self.features, self.visits = [sampler.start()] * (count + 1), [0] * count
        self.token_ids: list[ScaleTokens] = [torch.empty(0, 0, dtype=torch.long)] * count
        self.kept = [kept.to(device) if bool(kept.any()) else None for kept in known.kept] if known else [None] * count
        draws = [kept is None or not bool(kept.all()) for kept in self.kept]
        # a causal model reads the keys of every scale before one that is drawn
        self.predicts = [draws[k] or (sampler.has_cache and any(draws[k:])) for k in range(count)]

    def scales(self, rounds: Sequence[int]) -> Iterator[Scale]:
        for scale, count in enumerate(rounds):
            yield self.visit(scale, masked_rounds=count if self.scheduler.mode == "masked" else 0)
            for _ in range(count if self.scheduler.mode == "simple" else 0):
                first = scale + 1 - self.scheduler.jump_scales
                yield from self.quantized_again(self.features[scale + 1], first)
                for again in range(first, scale + 1):
                    yield self.visit(again)

    @torch.no_grad()
    def visit(self, scale: int, *, masked_rounds: int = 0) -> Scale:
        """Draw a scale from the features before it, with the kept tokens in their places."""
        features = self.features[scale]
        if not self.predicts[scale]:
            return self._add(scale, self._source(scale))
        drawn = self._draw(scale, self.sampler.predict(scale, features))
        for _ in range(masked_rounds):
            hidden = self.scheduler.hidden_by_probability(drawn.probabilities)
            # a share always hides some; asking would make the CPU wait for the GPU
            if self.scheduler.config["p_min"] is not None and not bool(hidden.any()):
                break  # nothing to draw again, now or later
            again = self._draw(scale, self.sampler.predict_again(scale, features, drawn.codes, hidden))
            drawn = merged(drawn, again, hidden)
        kept = self.kept[scale]
        if kept is None:
            return self._add(scale, drawn.token_ids, drawn.codes)
        source = self._source(scale)
        kept_map = kept.reshape(len(kept), 1, *drawn.codes.shape[-2:])
        codes = torch.where(kept_map, self.sampler.tokenizer.lookup(source), drawn.codes)
        return self._add(scale, torch.where(kept, source, drawn.token_ids), codes)

    @torch.no_grad()
    def quantized_again(self, features: LatentMap, num_scales: int) -> list[Scale]:
        """The first scales as the tokens found in `features`, kept tokens being the source's: from the changed one on.

        A causal model reads them again: the keys of a scale follow from the tokens before it.
        """
        # with `smooth`, a mixture of codes is replaced by a code: features change even where the token comes back
        found, changed = [], bool(self.sampler.options.smooth)
        for scale in range(num_scales):
            before, kept = self.features[scale], self.kept[scale]
            if changed and scale and self.sampler.has_cache and self.predicts[scale]:
                self.sampler.predict(scale, before)
            with whole_fp32():
                token_ids = self.sampler.tokenizer.nearest_tokens(features - before, self.sampler.schedule.sizes[scale])
            if kept is not None:
                token_ids = torch.where(kept, self._source(scale), token_ids)
            changed = changed or not torch.equal(token_ids, self.token_ids[scale])
            state = self._add(scale, token_ids)
            found += [state] if changed else []
        return found

    def _draw(self, scale: int, logits: Tensor) -> ScaleDraw:
        self.visits[scale] += 1
        return self.sampler.draw(scale, logits, round_index=self.visits[scale] - 1)

    def _source(self, scale: int) -> ScaleTokens:
        assert self.known is not None, "only edits keep tokens"
        return self.known.token_ids(scale, self.features[scale])

    def _add(self, scale: int, token_ids: ScaleTokens, codes: FeatureMap | None = None) -> Scale:
        codes = self.sampler.tokenizer.lookup(token_ids) if codes is None else codes
        self.token_ids[scale] = token_ids
        self.features[scale + 1] = self.sampler.add(scale, self.features[scale], codes)
        return Scale(scale, token_ids, self.features[scale + 1])
