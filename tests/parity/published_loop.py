"""Sampling as the published network does it, out of public functions: every number on the way is kept."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.next_scale.pyramid import next_scale_input
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.guidance import GuidanceSchedule, guidance_values
from isthmus.nn.sampling import guided_logits
from tests.testers import PARITY_ATOL, assert_parity


@dataclass
class Turn:
    """One scale: guided logits, drawn ids, codes as a map, features after it."""

    logits: Tensor
    token_ids: Tensor
    codes: Tensor
    features: Tensor


@torch.no_grad()
def generate(
    tokenizer: MultiScaleVQVAE,
    prior: NextScaleTransformer,
    labels: Tensor,
    cfg: float,
    draw: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> list[Turn]:
    """One `Turn` per scale. `cfg` counts as published (0 = off); `draw(scale, logits)` gives ids and codes."""
    schedule, batch = tokenizer.schedule, len(labels)
    guidance = guidance_values(GuidanceSchedule("linear", 1.0, 1.0 + cfg), schedule.num_scales)
    both = torch.cat([labels, torch.full_like(labels, prior.null_class_id)])
    conditioning, cache = prior.condition(both), prior.new_cache(2 * batch)
    seen = []

    def choose(scale, features):
        empty = features.new_zeros(batch, 0, features.shape[1])
        rows = next_scale_input(features, schedule, scale) if scale else empty
        logits = prior.forward_scale(scale, rows.repeat(2, 1, 1), conditioning, cache)
        guided = guided_logits(logits[:batch], logits[batch:], guidance[scale])
        token_ids, codes = draw(scale, guided)
        seen.append((guided, token_ids, codes))
        return token_ids, codes

    states = list(tokenizer.residual_scales(choose, labels))
    return [Turn(*parts, state.features) for parts, state in zip(seen, states, strict=True)]


def guided_tolerance(cfg: float, ratio: float) -> float:
    """Absolute tolerance of guided logits at `ratio` = k / (K - 1).

    s cond - (s - 1) uncond with s = 1 + cfg r carries the rounding of its two terms up to 2 s - 1 times. Each is good
    to 1e-5: on three instruction sets they were 6e-6 apart at most. At cfg 4 the stored logits are themselves 4e-5 away
    from the same network evaluated in fp64 (ours are 3e-5 away).
    """
    return max(PARITY_ATOL, (1 + 2 * cfg * ratio) * 1e-5)


def assert_turns(io: dict[str, Tensor], prefix: str, turns: list[Turn], tokenizer: MultiScaleVQVAE, cfg: float) -> None:
    """Guided logits, indices, h, Fhat, next map and image of one stored generation."""
    for scale, turn in enumerate(turns):
        at = f"{prefix}.scale{scale}"
        assert_parity(turn.logits, io[f"{at}.cfg_logits"], atol=guided_tolerance(cfg, scale / (len(turns) - 1)))
        assert_parity(turn.token_ids, io[f"{at}.idx"])
        assert_parity(turn.codes, io[f"{at}.h"])
        assert_parity(turn.features, io[f"{at}.f_hat"])
        if scale + 1 < len(turns):
            rows = next_scale_input(turn.features, tokenizer.schedule, scale + 1)
            assert_parity(rows, io[f"{at}.next_map"].flatten(2).transpose(1, 2))
    with torch.no_grad():
        assert_parity((tokenizer.decode_features(turns[-1].features) + 1) / 2, io[f"{prefix}.out.image_01"])
