"""Draws that revise themselves: tokens of a scale are drawn again before, or after, the next scale is.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion" (token resampling, simple and masked; numbers and
thresholds are ours: spec of SRDD, 3.2). `ScaleRefinementScheduler` says what is drawn again, `ScaleSampler` draws.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import Scale, tokens_to_map
from isthmus.next_scale.sampling import ScaleDraw, ScaleSampler
from isthmus.nn.saved_model import Recorded, records_arguments
from isthmus.nn.shapes import FeatureMap, LatentMap, ScaleTokens

RefinementMode = Literal["none", "simple", "masked"]
DEFAULT_SHARE = 0.3
DEFAULT_JUMP_SCALES = 2


@dataclass(frozen=True)
class Forwards:
    """Predictions of a scale in one draw, rounds included; labelled and null rows of a scale are one. `least` is `most`
    unless the number depends on what is drawn.
    """

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
            scale (simple: from the first scale that a jump can start from, `jump_scales` counted from 0, to the fourth:
            with 2 the third and fourth). The first scale has no context and none.
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
        self._refuse_unused(rounds=rounds, share=share, p_min=p_min, jump_scales=jump_scales)
        if share is not None and p_min is not None:
            raise UserError(f"tokens are chosen by share or by p_min, got {share} and {p_min}. Pass one of them.")
        if p_min is not None and not 0 < p_min < 1:
            raise UserError(f"p_min is a probability in (0, 1), got {p_min}. Leave it out to choose by share.")
        if share is not None and not 0 < share <= 1:
            raise UserError(f"share must lie in (0, 1], got {share}. Use mode='none' to draw nothing again.")
        if jump_scales is not None and jump_scales < 1:
            raise UserError(f"jump_scales must be at least 1 (the scale the jump starts from), got {jump_scales}.")
        given = () if rounds is None else tuple(rounds)
        if any(not isinstance(count, int) or count < 0 for count in given) or (given and given[0]):
            raise UserError(
                f"rounds needs one number per scale, 0 or more, and 0 for the first scale, got {given}. "
                "For example 0,1,1,1."
            )
        self.jump_scales = DEFAULT_JUMP_SCALES if jump_scales is None else jump_scales
        self.share = DEFAULT_SHARE if share is None else float(share)
        for scale, count in enumerate(given):
            if mode == "simple" and count and scale < self.jump_scales:
                raise UserError(
                    f"a jump over {self.jump_scales} scales must keep at least the first one, got a round at scale "
                    f"{scale} (from 0). Start later, or lower jump_scales."
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
        rounds = self._rounds_on(num_scales)
        if not any(rounds):
            raise UserError(
                f"mode {self.mode!r} must draw some scale again, got no round on {num_scales} scale(s). Give rounds "
                "at scales that it has, or use mode 'none'."
            )
        return rounds

    def forwards_of(self, num_scales: int, *, has_cache: bool, smooth: bool) -> Forwards:
        """What a draw costs, whatever the batch it is part of; `has_cache` for a causal model.

        Two things depend on what is drawn: a round by `p_min` in which no token is less probable is left out, and a
        jump of a causal model reads the kept scales again where their tokens changed (with `smooth`, which mixes codes,
        always).

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

    def _rounds_on(self, num_scales: int) -> tuple[int, ...]:
        given = self.config["rounds"]
        if given is None:
            first = self.jump_scales if self.mode == "simple" else 1
            return tuple(int(first <= scale < 4) for scale in range(num_scales))
        if any(given[num_scales:]):
            raise UserError(
                f"rounds must be those of this model's {num_scales} scales, got {tuple(given)}, which has rounds for a "
                f"scale that does not exist. Leave out what lies beyond scale {num_scales - 1} (from 0)."
            )
        return tuple(given[:num_scales]) + (0,) * (num_scales - len(given))

    def hidden_by_probability(self, probabilities: Float[Tensor, "b l"]) -> Bool[Tensor, "b l"]:
        """What a masked round draws again, from guided probabilities at the draw's temperature, before filters."""
        p_min = self.config["p_min"]
        return probabilities < p_min if p_min is not None else lowest_share(probabilities, self.share)

    def _refuse_unused(self, **given: object) -> None:
        used = {"none": (), "simple": ("rounds", "jump_scales"), "masked": ("rounds", "share", "p_min")}[self.mode]
        for name, value in given.items():
            if value is not None and name not in used:
                raise UserError(f"mode {self.mode!r} has no {name}, got {value}. Leave it out, or choose another mode.")


def lowest_share(values: Float[Tensor, "b l"], share: float) -> Bool[Tensor, "b l"]:
    """The ceil(share * l) lowest values of every row; of equal ones the first go first.

    >>> lowest_share(torch.tensor([[0.5, 0.1, 0.9, 0.1]]), 0.25)
    tensor([[False,  True, False, False]])
    """
    # less a hair: 0.3 * 10 is 3 and must not count as 4 by rounding
    count = math.ceil(share * values.shape[1] - 1e-9)
    order = values.sort(dim=1, stable=True).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, order[:, :count], True)


def refined_scales(sampler: ScaleSampler, scheduler: ScaleRefinementScheduler | None = None) -> Iterator[Scale]:
    """Draw the tokens of every scale, with the rounds that `scheduler` asks for; None draws every token once.

    A scale comes when it is drawn, and after a jump once more where it has changed or was drawn again: the last one of
    an index counts. Raises UserError as `rounds_of`.
    """
    num_scales = sampler.schedule.num_scales
    rounds = (0,) * num_scales if scheduler is None else scheduler.rounds_of(num_scales)
    return _refined(sampler, scheduler, rounds)


def _refined(
    sampler: ScaleSampler, scheduler: ScaleRefinementScheduler | None, rounds: tuple[int, ...]
) -> Iterator[Scale]:
    state = _State(sampler.start())
    for scale in range(sampler.schedule.num_scales):
        yield _draw(sampler, state, scale, scheduler, rounds[scale])
        if scheduler is None or scheduler.mode != "simple":
            continue
        for _ in range(rounds[scale]):
            kept = scale + 1 - scheduler.jump_scales
            yield from _jump_back(sampler, state, kept)
            for again in range(kept, scale + 1):
                yield _draw(sampler, state, again, None, 0)


@dataclass
class _State:
    """What has been drawn: the scales up to the last one drawn, their summed features, and how often each scale was
    drawn (`visits`), which is the round of its next random numbers.
    """

    features: LatentMap
    token_ids: list[ScaleTokens] = field(default_factory=list)
    visits: Counter[int] = field(default_factory=Counter)


def _draw(
    sampler: ScaleSampler, state: _State, scale: int, scheduler: ScaleRefinementScheduler | None, rounds: int
) -> Scale:
    """Draw a scale with its masked rounds, and add it to the state."""
    before, logits = state.features, sampler.predict(scale, state.features)
    drawn = sampler.draw(scale, logits, round_index=state.visits[scale])
    state.visits[scale] += 1
    if scheduler is not None and scheduler.mode == "masked" and rounds:
        with torch.inference_mode():
            probabilities = _probability(drawn, drawn.token_ids)
            for _ in range(rounds):
                hidden = scheduler.hidden_by_probability(probabilities)
                # a share always hides some; asking would make the CPU wait for the GPU
                if scheduler.config["p_min"] is not None and not bool(hidden.any()):
                    break  # nothing to draw again, now or later
                again = redraw(sampler, scale, before, drawn.codes, hidden, state.visits[scale])
                state.visits[scale] += 1
                probabilities = torch.where(hidden, _probability(again, again.token_ids), probabilities)
                drawn = merged(drawn, again, hidden)
    state.features = sampler.add(scale, before, drawn.codes)
    state.token_ids = [*state.token_ids[:scale], drawn.token_ids]
    # copied out of inference mode: a caller may go on computing with them
    return Scale(scale, drawn.token_ids.clone(), state.features.clone())


def redraw(
    sampler: ScaleSampler,
    scale: int,
    before: LatentMap,
    codes: FeatureMap,
    hidden: Bool[Tensor, "b l"],
    round_index: int,
) -> ScaleDraw:
    """A draw of the whole scale (from 1) that has seen the codes that are not hidden; one forward.

    The sampler has predicted this scale already, `before` are the features before it, `hidden` is True where a token is
    to be drawn again, and `round_index` counts its random numbers from 1.
    """
    logits = sampler.predict_again(scale, before, codes, hidden)
    return sampler.draw(scale, logits, round_index=round_index)


def merged(old: ScaleDraw, new: ScaleDraw, hidden: Bool[Tensor, "b l"]) -> ScaleDraw:
    """`new` where hidden, `old` elsewhere."""
    chosen = tokens_to_map(hidden.unsqueeze(-1).to(old.codes.dtype)).bool()
    return ScaleDraw(
        torch.where(hidden, new.token_ids, old.token_ids),
        torch.where(chosen, new.codes, old.codes),
        torch.where(hidden.unsqueeze(-1), new.logits, old.logits),
    )


def _jump_back(sampler: ScaleSampler, state: _State, kept: int) -> Iterator[Scale]:
    """The first `kept` scales of the features, quantised anew; yields those from the first changed one on.

    A causal model reads them again: the keys of a scale follow from the tokens before it. With `smooth` every scale has
    changed: a mixture of codes is replaced by a code, even where the token comes back.
    """
    token_ids, mixed = sampler.requantize(state.features, kept), sampler.options.smooth
    pairs = zip(token_ids, state.token_ids[:kept], strict=True)
    changed = [mixed or not torch.equal(ids, before) for ids, before in pairs]
    features = sampler.start()
    for scale, ids in enumerate(token_ids):
        if sampler.has_cache and any(changed[:scale]):
            sampler.predict(scale, features)
        features = sampler.add(scale, features, sampler.lookup(ids))
        if any(changed[: scale + 1]):
            yield Scale(scale, ids.clone(), features.clone())
    state.features, state.token_ids = features, token_ids


def _probability(drawn: ScaleDraw, token_ids: ScaleTokens) -> Tensor:
    """(b, l): what the guided model, at the temperature of the draw, thinks of the tokens.

    Before the filters: under top_k=1 every token has the whole of what is left, and nothing would tell them apart.
    """
    return drawn.logits.softmax(dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
