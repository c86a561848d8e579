"""Draws that revise themselves: tokens of a scale are drawn again before, or after, the next scale is.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion"; spec of SRDD, 3.2. The loop reads
`ScaleRefinementScheduler` for what to draw again and `ScaleSampler` for how.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from isthmus.functional.quantization import Scale, tokens_to_map
from isthmus.functional.shapes import FeatureMap, LatentMap, ScaleTokens
from isthmus.generation.next_scale import ScaleDraw, ScaleSampler
from isthmus.schedulers.scale_refinement import ScaleRefinementScheduler


def refined_scales(sampler: ScaleSampler, scheduler: ScaleRefinementScheduler | None = None) -> Iterator[Scale]:
    """Draw the tokens of every scale, with the rounds that `scheduler` asks for; None draws every token once.

    Yields:
        One `Scale` per scale when it is drawn, and after a jump once more each scale that has changed or was drawn
        again: the last one of an index counts.

    Raises:
        UserError: rounds for a scale that does not exist.
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
    """What has been drawn.

    Attributes:
        features: sum of the scales in `token_ids`.
        token_ids: of scales 0.. up to the last one drawn.
        visits: how often each scale was drawn: the round of its next random numbers.
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
    """A draw of the whole scale that has seen the codes that are not hidden; one forward.

    Args:
        sampler: has predicted this scale already.
        scale: the scale, from 1.
        before: features before the scale.
        codes: (b, d, s, s) of the scale as it stands.
        hidden: True where a token is to be drawn again.
        round_index: of the random numbers, from 1.
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
