"""The editing loop: what is kept stays, what is known decides nothing else, jumps cost what they say."""

import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.generation.editing import Jumps, KnownPart, edit_scales, known_part, tokens_as_they_are
from isthmus.generation.next_scale import ScaleSampler, generate_scales
from isthmus.generation.options import SamplingOptions
from tests.pipelines.tiny import tiny_pipeline

SEEDS = [(7, i) for i in range(3)]
LABELS = torch.tensor([0, 2, 3])
OPTIONS = SamplingOptions(guidance_scale=2.0, top_k=9)
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def left_half(rows: int = 3) -> torch.Tensor:
    mask = torch.zeros(rows, 1, 8, 8)
    mask[..., :4] = 1
    return mask


def edit(pipe, known, *, jumps=None, options=OPTIONS, rows=(0, 1, 2)):
    """Token ids of every scale, features and the number of forwards."""
    rows = list(rows)
    seeds = [SEEDS[i] for i in rows]
    sampler = ScaleSampler(pipe.image_tokenizer, pipe.transformer, LABELS[rows], seeds, options)
    token_ids, features = {}, None
    for scale in edit_scales(pipe.image_tokenizer, sampler, known, jumps):
        token_ids[scale.index], features = scale.token_ids, scale.features
    return [token_ids[k] for k in range(3)], features, sampler.num_forwards


def known_of(pipe, mask, rows=(0, 1, 2), **rule):
    return known_part(pipe.image_tokenizer, pipe.schedule, IMAGES[list(rows)], mask, **rule)


@pytest.fixture(params=["markov", "causal"])
def pipe(request):
    return tiny_pipeline(scale_attention=request.param)


@pytest.mark.parametrize("smooth", [False, True])
def test_nothing_known_is_sampling(pipe, smooth):
    options = SamplingOptions(guidance_scale=2.0, top_k=9, smooth=smooth)
    token_ids, features, forwards = edit(pipe, known_of(pipe, torch.ones(3, 1, 8, 8)), options=options)
    drawn = list(generate_scales(pipe.image_tokenizer, pipe.transformer, LABELS, SEEDS, options))
    assert all(torch.equal(ours, scale.token_ids) for ours, scale in zip(token_ids, drawn, strict=True))
    assert torch.equal(features, drawn[-1].features) and forwards == 3


@pytest.mark.parametrize("keeping", ["coverage", "published"])
def test_everything_known_is_the_image_and_costs_no_forward(pipe, keeping):
    token_ids, features, forwards = edit(pipe, known_of(pipe, torch.zeros(3, 1, 8, 8), keeping=keeping))
    encoded = pipe.image_tokenizer.encode(IMAGES).token_ids
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(token_ids, encoded, strict=True))
    assert_close(features, pipe.image_tokenizer.features_up_to(encoded, 2))
    assert forwards == 0


def test_kept_tokens_are_those_given_and_the_others_are_drawn_from_the_mended_state(pipe):
    source = pipe.image_tokenizer.encode(IMAGES).token_ids
    kept = [
        torch.zeros(3, 1, dtype=torch.bool),
        torch.tensor([[True, False, False, True]] * 3),
        torch.rand(3, 16) < 0.5,
    ]
    token_ids, features, _ = edit(pipe, KnownPart(kept, tokens_as_they_are(source)))
    for ours, theirs, which in zip(token_ids, source, kept, strict=True):
        assert torch.equal(ours[which], theirs[which])
    assert_close(features, pipe.image_tokenizer.features_up_to(token_ids, 2))
    free, _, _ = edit(pipe, known_of(pipe, torch.ones(3, 1, 8, 8)))
    assert torch.equal(token_ids[0], free[0]) and torch.equal(token_ids[1][~kept[1]], free[1][~kept[1]])
    assert not torch.equal(token_ids[2][~kept[2]], free[2][~kept[2]])


def test_tokens_found_anew_mend_what_drawn_ones_spill(pipe):
    """Requantising against the state leaves less error over known pixels than the source's own tokens do."""
    mask = left_half()
    latents = pipe.image_tokenizer.latents(IMAGES)
    rule = {"max_unknown": 0.0}
    with torch.no_grad():
        anew = known_of(pipe, mask, **rule)
        as_is = KnownPart(anew.kept, tokens_as_they_are(pipe.image_tokenizer.requantize(latents)))
        errors = [(edit(pipe, known)[1] - latents)[..., 3:].square().mean() for known in (anew, as_is)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("jumps", [None, Jumps((0, 1, 2), 2)])
def test_an_edit_depends_on_its_own_seed_alone(pipe, jumps):
    together, _, _ = edit(pipe, known_of(pipe, left_half()), jumps=jumps)
    for rows in ([2, 0], [1]):
        alone, _, _ = edit(pipe, known_of(pipe, left_half(len(rows)), rows), jumps=jumps, rows=rows)
        assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(alone, together, strict=True))


def test_a_jump_costs_the_forwards_of_the_scales_it_repeats():
    markov, causal = (tiny_pipeline(scale_attention=kind) for kind in ("markov", "causal"))
    for per_scale, num_scales, cost, prefix in (
        ((0, 1, 0), 1, 1, 0),
        ((0, 0, 2), 1, 2, 2),
        ((0, 1, 1), 2, 4, 0),
        ((0, 0, 1), 3, 3, 0),
    ):
        jumps, rule = Jumps(per_scale, num_scales), {"max_unknown": 0.25}
        assert edit(markov, known_of(markov, left_half(), **rule), jumps=jumps)[2] == 3 + cost
        # a causal model reads kept scales again where tokens before them changed
        assert 3 + cost <= edit(causal, known_of(causal, left_half(), **rule), jumps=jumps)[2] <= 3 + cost + prefix


def test_a_causal_jump_leaves_the_cache_as_a_fresh_one_would_be():
    """After jumps, the last scale's prediction is that of a sampler that only ever saw the final tokens."""
    pipe = tiny_pipeline(scale_attention="causal")
    token_ids, features, _ = edit(pipe, known_of(pipe, left_half()), jumps=Jumps((0, 2, 0), 2))
    sampler = ScaleSampler(pipe.image_tokenizer, pipe.transformer, LABELS, SEEDS, OPTIONS)
    state = sampler.start()
    for scale in range(3):
        logits = sampler.predict(scale, state)
        state = sampler.add(scale, state, pipe.image_tokenizer.lookup(token_ids[scale]))
    kept = known_of(pipe, left_half()).kept[2]
    assert torch.equal(sampler.draw(2, logits).token_ids[~kept], token_ids[2][~kept])
    assert_close(state, features)


def test_scales_from_one_on_are_drawn(pipe):
    source = pipe.image_tokenizer.encode(IMAGES).token_ids
    for first in range(4):
        token_ids, _, _ = edit(pipe, known_of(pipe, torch.zeros(3, 1, 8, 8), from_scale=first))
        same = [torch.equal(ours, theirs) for ours, theirs in zip(token_ids, source, strict=True)]
        assert all(same[:first]) and not any(same[max(first, 1) :])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"max_unknown": 1.0}, "max_unknown"),
        ({"max_unknown": -0.1}, "max_unknown"),
        ({"max_unknown": (0.5, 0.5)}, "one per scale"),
        ({"from_scale": 4}, "from_scale"),
        ({"from_scale": -1}, "from_scale"),
    ],
)
def test_rules_out_of_range_are_refused(rule, said):
    with pytest.raises(UserError, match=said):
        known_of(tiny_pipeline(), left_half(), **rule)


@pytest.mark.parametrize(("jumps", "jump_scales"), [(-1, 1), (1, 0), ((1, 1), 1), ((0, -1, 0), 1)])
def test_jumps_out_of_range_are_refused(jumps, jump_scales):
    with pytest.raises(UserError, match="jump"):
        Jumps.of(jumps, jump_scales, 3)
