import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import next_scale_input, tokens_to_map
from isthmus.next_scale.refinement import ScaleRefinementScheduler, lowest_share, merged, refined_scales
from isthmus.next_scale.sampling import ScaleSampler
from isthmus.pipelines.options import SamplingOptions
from tests.pipelines.tiny import tiny_pipeline
from tests.testers import token_hashes
from tests.training.tiny_teacher import tiny_teacher


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    share=st.floats(0.01, 1.0),
)
def test_the_lowest_share_is_the_lowest(values, share):
    row = torch.tensor([values])
    hidden = lowest_share(row, share)
    assert int(hidden.sum()) == math.ceil(share * len(values) - 1e-9)
    if not bool(hidden.all()):
        assert row[hidden].max() <= row[~hidden].min()


@given(rows=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6), min_size=2, max_size=4))
def test_a_row_is_chosen_from_its_own_values(rows):
    together = lowest_share(torch.tensor(rows), 0.4)
    for i, row in enumerate(rows):
        assert torch.equal(lowest_share(torch.tensor([row]), 0.4)[0], together[i])


def test_p_min_hides_what_is_less_probable():
    scheduler = ScaleRefinementScheduler(mode="masked", p_min=0.2)
    assert scheduler.hidden_by_probability(torch.tensor([[0.1, 0.2, 0.9]])).tolist() == [[True, False, False]]


def test_rounds_have_defaults_and_fill_up():
    assert ScaleRefinementScheduler().rounds_of(5) == (0,) * 5
    assert ScaleRefinementScheduler(mode="masked").rounds_of(6) == (0, 1, 1, 1, 0, 0)
    assert ScaleRefinementScheduler(mode="masked").rounds_of(2) == (0, 1)
    assert ScaleRefinementScheduler(mode="simple").rounds_of(6) == (0, 0, 1, 1, 0, 0)
    assert ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 0)).rounds_of(2) == (0, 2)


def test_what_is_saved_comes_back(tmp_path):
    made = ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 2), jump_scales=1)
    made.save_pretrained(tmp_path)
    back = ScaleRefinementScheduler.from_pretrained(tmp_path)
    assert back.mode == "simple" and back.rounds_of(4) == (0, 0, 2, 0) and back.jump_scales == 1


def test_what_makes_no_sense_is_refused():
    for arguments, said in [
        ({"mode": "masked", "p_min": 0.0}, r"p_min.*\(0, 1\)"),
        ({"mode": "masked", "p_min": 1.0}, r"p_min.*\(0, 1\)"),
        ({"mode": "masked", "p_min": float("nan")}, r"p_min.*\(0, 1\)"),
        ({"mode": "masked", "share": 0.0}, r"share must lie in \(0, 1\]"),
        ({"mode": "masked", "share": 1.5}, r"share must lie in \(0, 1\]"),
        ({"mode": "masked", "share": 0.2, "p_min": 0.1}, "one of them"),
        ({"mode": "masked", "rounds": (1, 0)}, "0 for the first"),
        ({"mode": "masked", "rounds": (0, -1)}, "0 or more"),
        ({"mode": "masked", "jump_scales": 2}, "has no jump_scales"),
        ({"mode": "simple", "p_min": 0.1}, "has no p_min"),
        ({"mode": "simple", "share": 0.1}, "has no share"),
        ({"mode": "none", "rounds": (0, 1)}, "has no rounds"),
        ({"mode": "simple", "jump_scales": 0}, "at least 1"),
        ({"mode": "simple", "rounds": (0, 1)}, "keep at least the first"),
    ]:
        with pytest.raises(UserError, match=said):
            ScaleRefinementScheduler(**arguments)
    for arguments, num_scales in [
        ({"mode": "masked"}, 1),
        ({"mode": "masked", "rounds": (0, 0)}, 4),
        ({"mode": "simple"}, 2),
        ({"mode": "simple", "jump_scales": 4}, 6),
        ({"mode": "masked", "rounds": ()}, 3),
    ]:
        with pytest.raises(UserError, match="no round"):
            ScaleRefinementScheduler(**arguments).rounds_of(num_scales)


SEEDS = [(7, i) for i in range(4)]
LABELS = torch.tensor([0, 2, 3, 1])
OPTIONS = SamplingOptions(guidance_scale=(1.0, 2.0, 1.5), top_k=9)


SCHEDULERS = {
    "masked": ScaleRefinementScheduler(mode="masked", rounds=(0, 1, 2)),
    "p_min": ScaleRefinementScheduler(mode="masked", p_min=0.2),
    "simple": ScaleRefinementScheduler(mode="simple", rounds=(0, 1, 2), jump_scales=1),
    "simple, far": ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 2), jump_scales=2),
}


def sampler_of(pipe, rows=(0, 1, 2, 3), options=OPTIONS):
    chosen = list(rows)
    return ScaleSampler(pipe.image_tokenizer, pipe.transformer, LABELS[chosen], [SEEDS[i] for i in chosen], options)


def drawn(sampler, scheduler):
    """Tokens per scale, the last visit counting, and the last features."""
    scales = list(refined_scales(sampler, scheduler))
    last = {scale.index: scale.token_ids for scale in scales}
    return [last[k] for k in sorted(last)], scales[-1].features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "smooth"),
    [
        ("masked", "causal", True), ("p_min", "markov", False), ("simple", "markov", True),
        ("simple, far", "causal", False), ("simple", "causal", True),
    ],
)  # fmt: skip
def test_an_image_depends_on_its_own_seed_alone(name, attention, smooth):
    pipe = tiny_pipeline(scale_attention=attention)
    options = SamplingOptions(guidance_scale=(1.0, 2.0, 1.5), top_k=9, smooth=smooth)
    together, _ = drawn(sampler_of(pipe, options=options), SCHEDULERS[name])
    for rows in ([0], [3, 1]):
        alone, _ = drawn(sampler_of(pipe, rows, options), SCHEDULERS[name])
        for ours, theirs in zip(alone, together, strict=True):
            assert torch.equal(ours, theirs[rows])


def test_rounds_change_draws():
    pipe = tiny_pipeline()
    plain = token_hashes(drawn(sampler_of(pipe), None)[0])
    assert all(token_hashes(drawn(sampler_of(pipe), each)[0]) != plain for each in SCHEDULERS.values())


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_a_round_costs_one_forward_and_a_jump_those_of_the_scales_it_repeats(attention):
    for name, forwards in {"masked": 3 + 3, "simple": 3 + 3, "simple, far": 3 + 4}.items():
        sampler = sampler_of(tiny_pipeline(scale_attention=attention))
        visits = [scale.index for scale in refined_scales(sampler, SCHEDULERS[name])]
        # a causal model also reads the kept scales after the first changed one again: scale 1, where a jump over the
        # last scale alone changed scale 0
        again = visits[visits.index(2) :].count(0) if name == "simple" else 0
        assert sampler.num_forwards == forwards + (again if attention == "causal" else 0)


def test_rows_in_which_nothing_is_hidden_cost_nothing():
    sampler = sampler_of(tiny_pipeline())
    drawn(sampler, ScaleRefinementScheduler(mode="masked", p_min=1e-30))
    assert sampler.num_forwards == 3


@torch.no_grad()
def tokens_by_definition(pipe, rounds, share, options):
    """Masked resampling, teacher-forced from the start at every forward: slow, plain, without a cache."""
    tokenizer, transformer, plain = pipe.image_tokenizer, pipe.transformer, sampler_of(pipe, options=options)
    schedule, null = tokenizer.schedule, torch.full_like(LABELS, transformer.null_class_id)
    done, features = [], plain.start()

    def logits_of(scale, own_input, hidden):
        known = done + [torch.zeros(len(LABELS), n, dtype=torch.long) for n in schedule.lengths[scale:]]
        inputs = tokenizer.scale_inputs(known)
        start = schedule.offsets[scale] - 1
        marks = torch.zeros(inputs.shape[:2], dtype=torch.bool)
        if own_input is not None:
            inputs[:, start : start + schedule.lengths[scale]] = own_input
            marks[:, start : start + schedule.lengths[scale]] = hidden
        cut = slice(schedule.offsets[scale], schedule.offsets[scale + 1])
        cond, uncond = (transformer(ids, inputs, hidden=marks).logits[:, cut] for ids in (LABELS, null))
        return uncond + plain.guidance[scale] * (cond - uncond)

    def confidence(logits, token_ids):
        """Guided, at the temperature of the draw, whatever the filters left to draw from."""
        return (logits / options.temperature).softmax(-1).gather(-1, token_ids[..., None])[..., 0]

    for scale in range(3):
        logits = logits_of(scale, None, None)
        draw = plain.draw(scale, logits)
        p = confidence(logits, draw.token_ids)
        for round_index in range(1, rounds[scale] + 1):
            count = -int(-share * schedule.lengths[scale] // 1)
            hidden = torch.zeros_like(p, dtype=torch.bool)
            hidden.scatter_(1, p.argsort(dim=1, stable=True)[:, :count], True)
            own = tokenizer.partial_scale_input(features, draw.codes, hidden, scale)
            logits = logits_of(scale, own, hidden)
            again = plain.draw(scale, logits, round_index=round_index)
            p = torch.where(hidden, confidence(logits, again.token_ids), p)
            draw = merged(draw, again, hidden)
        features = plain.add(scale, features, draw.codes)
        done.append(draw.token_ids)
    return done


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("causal", OPTIONS),
        # greedy: what is left after the filters has probability 1 everywhere, and tells no token from another
        ("markov", SamplingOptions(guidance_scale=(1.0, 2.0, 1.5), top_k=1, temperature=0.7)),
    ],
    ids=["causal", "markov-greedy"],
)
def test_masked_rounds_are_what_the_definition_says(attention, options):
    """For causal models: the cache holds the ordinary keys of a scale after its rounds."""
    pipe = tiny_pipeline(scale_attention=attention)
    scheduler = ScaleRefinementScheduler(mode="masked", rounds=(0, 2, 1), share=0.5)
    tokens, _ = drawn(sampler_of(pipe, options=options), scheduler)
    assert token_hashes(tokens) == token_hashes(tokens_by_definition(pipe, (0, 2, 1), 0.5, options))


def test_greedy_rounds_draw_the_tokens_again_that_the_unfiltered_model_finds_least_likely():
    sampler = sampler_of(tiny_pipeline(), options=SamplingOptions(guidance_scale=2.0, top_k=1))
    state = sampler.start()
    for scale in range(2):
        state = sampler.add(scale, state, sampler.draw(scale, sampler.predict(scale, state)).codes)
    logits = sampler.predict(2, state)
    first = sampler.draw(2, logits)
    lowest = logits.softmax(-1).amax(-1).argsort(dim=1)[:, :5]  # ceil(0.3 * 16) of the likeliest code's probabilities
    hidden = torch.zeros_like(first.token_ids, dtype=torch.bool).scatter(1, lowest, True)
    assert bool((~hidden[:, :5]).any()), "other tokens than the first ones"
    again = sampler.draw(2, sampler.predict_again(2, state, first.codes, hidden), round_index=1)
    tokens, _ = drawn(
        sampler_of(tiny_pipeline(), options=sampler.options),
        ScaleRefinementScheduler(mode="masked", rounds=(0, 0, 1)),
    )
    assert torch.equal(tokens[2], torch.where(hidden, again.token_ids, first.token_ids))


def test_greedy_rounds_by_p_min_take_place():
    sampler = sampler_of(tiny_pipeline(), options=SamplingOptions(top_k=1))
    drawn(sampler, ScaleRefinementScheduler(mode="masked", p_min=0.9))
    assert sampler.num_forwards == 5


@torch.no_grad()
def test_a_jump_goes_on_from_the_features_quantised_anew():
    pipe = tiny_pipeline(scale_attention="causal")
    tokens, features = drawn(sampler_of(pipe), ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 1), jump_scales=1))
    # by hand: without a jump, then the first two scales of its features, then the third from the second random numbers
    plain = list(refined_scales(sampler_of(pipe)))
    kept = pipe.image_tokenizer.requantize(plain[-1].features)[:2]
    assert token_hashes(tokens[:2]) == token_hashes(kept)
    fresh = sampler_of(pipe)
    state = fresh.start()
    for scale, ids in enumerate(kept):
        fresh.predict(scale, state)
        state = fresh.add(scale, state, fresh.tokenizer.lookup(ids))
    last = fresh.draw(2, fresh.predict(2, state), round_index=1)
    assert torch.equal(last.token_ids, tokens[2])
    assert_close(fresh.add(2, state, last.codes), features)


@pytest.mark.slow
@torch.no_grad()
def test_with_smooth_a_causal_jump_reads_kept_scales_again_also_where_their_tokens_come_back():
    """Drawn as a mixture of codes, kept as the code: the tokens are the same, the features and keys are not."""
    pipe = tiny_teacher("causal", phi_ratio=0.0, sizes=(1, 2, 4))
    pipe.image_tokenizer.codebook.weight.copy_(torch.eye(16))
    options = SamplingOptions(top_k=2, smooth=True)
    labels = torch.zeros(300, dtype=torch.long)

    def fresh(image, count):
        seeds = [(1, index) for index in range(image, image + count)]
        return ScaleSampler(pipe.image_tokenizer, pipe.transformer, labels[:count], seeds, options)

    plain = list(refined_scales(fresh(0, 300)))
    found = pipe.image_tokenizer.requantize(plain[-1].features)
    back = torch.stack([(a == b.token_ids).all(dim=1) for a, b in zip(found[:2], plain[:2], strict=True)]).all(dim=0)
    images = back.nonzero().flatten().tolist()
    assert len(images) >= 3
    for image in images[:3]:
        sampler = fresh(image, 1)
        tokens, features = drawn(sampler, ScaleRefinementScheduler(mode="simple", rounds=(0, 0, 1), jump_scales=1))
        assert sampler.num_forwards == 3 + 2  # the last scale, and scale 1 for its keys
        hand = fresh(image, 1)
        state = hand.start()
        for scale in range(2):
            hand.predict(scale, state)
            state = hand.add(scale, state, hand.tokenizer.lookup(found[scale][image : image + 1]))
        last = hand.draw(2, hand.predict(2, state), round_index=1)
        assert torch.equal(last.token_ids, tokens[2])
        assert_close(hand.add(2, state, last.codes), features)


@torch.no_grad()
def test_hiding_nothing_and_hiding_all_are_the_known_inputs():
    pipe = tiny_pipeline()
    tokenizer = pipe.image_tokenizer
    generator = torch.Generator().manual_seed(0)
    features, ids = torch.randn(2, 4, 4, 4, generator=generator), torch.randint(16, (2, 16), generator=generator)
    codes, schedule = tokenizer.lookup(ids), tokenizer.schedule
    every, none = torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)
    assert torch.equal(
        tokenizer.partial_scale_input(features, codes, every, 2), next_scale_input(features, schedule, 2)
    )
    start = tokenizer.add_codes(torch.zeros_like(features), torch.zeros_like(codes), 2)
    whole = next_scale_input(tokenizer.add_codes(features, codes, 2) - start, schedule, 2)
    assert_close(tokenizer.partial_scale_input(features, codes, none, 2), whole)


@torch.no_grad()
def test_a_hidden_token_reaches_no_input():
    tokenizer, generator = tiny_pipeline().image_tokenizer, torch.Generator().manual_seed(1)
    features = torch.randn(3, 4, 4, 4, generator=generator)
    for scale, length in ((1, 4), (2, 16)):
        ids = torch.randint(16, (3, length), generator=generator)
        hidden, moved = torch.rand(3, length, generator=generator) < 0.5, (ids + 1) % 16
        given = (ids, torch.where(hidden, moved, ids), torch.where(hidden, ids, moved))
        one, two, three = (tokenizer.partial_scale_input(features, tokenizer.lookup(t), hidden, scale) for t in given)
        assert torch.equal(one, two) and not torch.equal(one, three)


def test_a_round_changes_hidden_tokens_only():
    sampler = sampler_of(tiny_pipeline())
    features = sampler.add(0, sampler.start(), sampler.draw(0, sampler.predict(0, sampler.start())).codes)
    first = sampler.draw(1, sampler.predict(1, features))
    hidden = torch.tensor([[True, False, False, True]]).expand(4, 4)
    again = sampler.draw(1, sampler.predict_again(1, features, first.codes, hidden), round_index=1)
    second = merged(first, again, hidden)
    assert torch.equal(second.token_ids[~hidden], first.token_ids[~hidden])
    chosen = tokens_to_map(hidden.unsqueeze(-1).float()).bool()
    assert torch.equal(second.codes.masked_fill(chosen, 0), first.codes.masked_fill(chosen, 0))


def test_a_causal_scale_needs_those_before_it():
    sampler = sampler_of(tiny_pipeline(scale_attention="causal"))
    with pytest.raises(UserError, match="after all earlier ones"):
        sampler.predict(1, sampler.start())


def test_rounds_need_scales():
    sampler = sampler_of(tiny_pipeline())
    with pytest.raises(UserError, match="does not exist"):
        refined_scales(sampler, ScaleRefinementScheduler(mode="masked", rounds=(0, 0, 0, 1)))
