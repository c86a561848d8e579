"""The editing loop: what is kept stays, what is known decides nothing else, jumps cost what they say."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.next_scale.editing import jumps_of, known_part
from isthmus.next_scale.refinement import KnownPart, refined_scales
from isthmus.next_scale.sampling import ScaleSampler
from isthmus.nn.draws import EDIT_STREAMS
from isthmus.pipelines.options import SamplingOptions
from tests.pipelines.tiny import tiny_pipeline
from tests.training.tiny_teacher import tiny_teacher

SEEDS = [(7, i) for i in range(3)]
LABELS = torch.tensor([0, 2, 3])
OPTIONS = SamplingOptions(guidance_scale=2.0, top_k=9)
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def left_half(rows: int = 3) -> torch.Tensor:
    mask = torch.zeros(rows, 1, 8, 8)
    mask[..., :4] = 1
    return mask


def visits(pipe, known, *, jumps=None, options=OPTIONS, rows=(0, 1, 2)):
    """Every visit of a scale, and the number of forwards."""
    rows = list(rows)
    seeds = [SEEDS[i] for i in rows]
    sampler = ScaleSampler(pipe.image_tokenizer, pipe.transformer, LABELS[rows], seeds, options, EDIT_STREAMS)
    return list(refined_scales(sampler, jumps, known)), sampler.num_forwards


def edit(pipe, known, **given):
    """Token ids of every scale, features and the number of forwards."""
    scales, forwards = visits(pipe, known, **given)
    token_ids = {scale.index: scale.token_ids for scale in scales}
    return [token_ids[k] for k in range(3)], scales[-1].features, forwards


def known_of(pipe, mask, rows=(0, 1, 2), **rule):
    return known_part(pipe.image_tokenizer, pipe.schedule, IMAGES[list(rows)], mask, **rule)


@pytest.fixture(params=["markov", "causal"])
def pipe(request):
    return tiny_pipeline(scale_attention=request.param)


def test_nothing_known_is_sampling_from_the_numbers_of_edits(pipe):
    known = known_of(pipe, torch.ones(3, 1, 8, 8))
    for options in (OPTIONS, replace(OPTIONS, smooth=True)):
        token_ids, features, forwards = edit(pipe, known, options=options)
        sampler = ScaleSampler(pipe.image_tokenizer, pipe.transformer, LABELS, SEEDS, options, EDIT_STREAMS)
        drawn = list(refined_scales(sampler))
        assert all(torch.equal(ours, scale.token_ids) for ours, scale in zip(token_ids, drawn, strict=True))
        assert torch.equal(features, drawn[-1].features) and forwards == 3


def test_everything_known_is_the_image_and_costs_no_forward(pipe):
    encoded = pipe.image_tokenizer.encode(IMAGES).token_ids
    for keeping in ("coverage", "published"):
        token_ids, features, forwards = edit(pipe, known_of(pipe, torch.zeros(3, 1, 8, 8), keeping=keeping))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(token_ids, encoded, strict=True))
        assert_close(features, pipe.image_tokenizer.features_up_to(encoded, 2))
        assert forwards == 0


def test_kept_tokens_are_those_given_and_the_others_are_drawn_from_the_mended_state(pipe):
    source = pipe.image_tokenizer.encode(IMAGES).token_ids
    kept = [
        torch.zeros(3, 1, dtype=torch.bool),
        torch.tensor([[True, False, False, True]] * 3),
        torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5,
    ]
    token_ids, features, _ = edit(pipe, KnownPart(kept, lambda scale, features: source[scale]))
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
        anew, own = known_of(pipe, mask, **rule), pipe.image_tokenizer.requantize(latents)
        as_is = KnownPart(anew.kept, lambda scale, features: own[scale])
        errors = [(edit(pipe, known)[1] - latents)[..., 3:].square().mean() for known in (anew, as_is)]
    assert errors[0] < errors[1]


def test_an_edit_depends_on_its_own_seed_alone(pipe):
    for jumps in (None, jumps_of((0, 0, 2), 2, 3), jumps_of((0, 1, 2), 1, 3)):
        together, _, _ = edit(pipe, known_of(pipe, left_half()), jumps=jumps)
        for rows in ([2, 0], [1]):
            alone, _, _ = edit(pipe, known_of(pipe, left_half(len(rows)), rows), jumps=jumps, rows=rows)
            assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(alone, together, strict=True))


def test_a_jump_costs_the_forwards_of_the_scales_it_repeats():
    markov, causal = (tiny_pipeline(scale_attention=kind) for kind in ("markov", "causal"))
    for per_scale, num_scales, cost in (((0, 1, 0), 1, 1), ((0, 0, 2), 1, 2), ((0, 1, 1), 1, 2), ((0, 0, 2), 2, 4)):
        jumps, rule = jumps_of(per_scale, num_scales, 3), {"max_unknown": 0.25}
        assert edit(markov, known_of(markov, left_half(), **rule), jumps=jumps)[2] == 3 + cost
        scales, forwards = visits(causal, known_of(causal, left_half(), **rule), jumps=jumps)
        # a causal model also reads scale 1 again, where a jump over the last scale alone changed scale 0 before it
        first = [scale.index for scale in scales].index(2)
        coarsest = [scale.token_ids for scale in scales[:first] if scale.index == 0][-1:]
        coarsest += [scale.token_ids for scale in scales[first:] if scale.index == 0]
        again = sum(not torch.equal(a, b) for a, b in pairwise(coarsest)) if num_scales == 1 else 0
        assert forwards == 3 + cost + again


@pytest.mark.slow
def test_with_smooth_a_causal_jump_reads_what_it_keeps_again():
    """Kept scales were drawn as mixtures and stay as codes: an image is drawn as beside others whose tokens change."""
    pipe = tiny_teacher("causal", phi_ratio=0.0, sizes=(1, 2, 4))
    with torch.no_grad():
        pipe.image_tokenizer.codebook.weight.copy_(torch.eye(16))
    options, jumps, tokenizer = SamplingOptions(top_k=2, smooth=True), jumps_of((0, 0, 1), 1, 3), pipe.image_tokenizer
    images = torch.zeros(40, 3, 8, 8)
    known = known_part(tokenizer, pipe.schedule, images, torch.ones(40, 1, 8, 8))
    seeds, labels = [(1, i) for i in range(40)], torch.zeros(40, dtype=torch.long)

    def drawn(rows):
        some = KnownPart([kept[rows] for kept in known.kept], known.token_ids)
        sampler = ScaleSampler(tokenizer, pipe.transformer, labels[rows], [seeds[i] for i in rows], options)
        last = {scale.index: scale.token_ids for scale in refined_scales(sampler, jumps, some)}
        return last, sampler.num_forwards

    together, _ = drawn(list(range(40)))
    for row in range(40):
        alone, forwards = drawn([row])
        assert forwards == 3 + 2 and all(torch.equal(alone[k][0], together[k][row]) for k in range(3))


def test_a_jump_is_not_read_for_where_everything_is_kept():
    pipe = tiny_pipeline(scale_attention="causal")
    options = SamplingOptions(top_k=9, smooth=True)
    known = known_of(pipe, torch.zeros(3, 1, 8, 8))
    token_ids, _, forwards = edit(pipe, known, jumps=jumps_of((0, 0, 1), 1, 3), options=options)
    encoded = pipe.image_tokenizer.encode(IMAGES).token_ids
    assert forwards == 0 and all(torch.equal(a, b) for a, b in zip(token_ids, encoded, strict=True))


def test_a_causal_jump_leaves_the_cache_as_a_fresh_one_would_be():
    """After jumps, the last scale's prediction is that of a sampler that only ever saw the final tokens."""
    pipe = tiny_pipeline(scale_attention="causal")
    token_ids, features, _ = edit(pipe, known_of(pipe, left_half()), jumps=jumps_of((0, 2, 0), 1, 3))
    sampler = ScaleSampler(pipe.image_tokenizer, pipe.transformer, LABELS, SEEDS, OPTIONS, EDIT_STREAMS)
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


def test_rules_out_of_range_are_refused():
    for rule, said in [
        ({"max_unknown": 1.0}, "max_unknown"),
        ({"max_unknown": -0.1}, "max_unknown"),
        ({"max_unknown": (0.5, 0.5)}, "one per scale"),
        ({"from_scale": 4}, "from_scale"),
        ({"from_scale": -1}, "from_scale"),
        ({"keeping": "published", "max_unknown": 0.5}, "own rule"),
    ]:
        with pytest.raises(UserError, match=said):
            known_of(tiny_pipeline(), left_half(), **rule)


def test_jumps_start_where_a_scale_stays():
    made = jumps_of(1, None, 4)
    assert made.rounds_of(4) == (0, 0, 1, 1) and made.jump_scales == 2
    assert jumps_of(0, None, 3) is None
    for jumps, jump_scales in [
        (-1, 1), (1, 0), ((1, 1), 1), ((0, -1, 0), 1), ((0, 1, 0), 2), ((1, 0, 0), 1), (0, 2), ((0, 0, 0), 1), (1, 3),
    ]:  # fmt: skip
        with pytest.raises(UserError, match="jump"):
            jumps_of(jumps, jump_scales, 3)
