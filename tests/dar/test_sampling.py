from itertools import pairwise

import pytest
import torch

from isthmus.dar.llama_decoding import LlamaDecoder
from isthmus.dar.prior import TokenLayout, next_token_logits
from isthmus.dar.sampling import Prefix, generate_tokens
from isthmus.errors import UserError
from isthmus.nn.draws import token_uniforms
from isthmus.nn.guidance import GuidanceSchedule, guidance_values
from isthmus.nn.sampling import draw_tokens, filter_logits
from isthmus.pipelines.options import SamplingOptions
from tests.dar.tiny_prior import LAYOUT, tiny_prior

N = LAYOUT.num_tokens
SEEDS = [(7, i) for i in range(5)]
LABELS = torch.tensor([0, 2, 3, 1, 0])  # 3 is the null label
PREFIX = torch.randint(24, (5, N), generator=torch.Generator().manual_seed(1))
VARIED = [
    SamplingOptions(guidance_scale=3.0, top_k=9),
    SamplingOptions(top_p=0.8, temperature=1.3),
    SamplingOptions(guidance_scale=2.0),
    SamplingOptions(guidance_scale=GuidanceSchedule("linear", 1.0, 4.0, last_guided_step=6), top_k=9),
    SamplingOptions(guidance_scale=(2.0, 1.0, 0.5) + (1.0,) * (N - 3), temperature=0.7),
]


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


def known(token_ids, lengths=None):
    """A prefix of all five images; all of it, where no lengths are given."""
    return Prefix(token_ids, [token_ids.shape[1]] * len(token_ids) if lengths is None else list(lengths))


def draw(prior, options=None, *, rows=range(5), stops=(N,), prefix=None):
    """Tokens of some of the five images, all together."""
    rows = list(rows)
    if isinstance(options, list):
        options = [options[i] for i in rows]
    if prefix is not None:
        prefix = Prefix(prefix.token_ids[rows], [prefix.lengths[i] for i in rows])
    seeds = [SEEDS[i] for i in rows]
    parts = list(
        generate_tokens(prior, LAYOUT, LABELS[rows], seeds, options or SamplingOptions(), stops=stops, prefix=prefix)
    )
    return torch.cat(parts, dim=1)


@torch.no_grad()
def tokens_by_definition(prior, options, lengths=(0,) * 5):
    """Teacher-forced from the start for every token, both halves always, one image after the other: slow and plain."""
    drawn = PREFIX.clone()
    for i, length in enumerate(lengths):
        option, label = options[i], LABELS[i : i + 1]
        null = torch.full_like(label, LAYOUT.null_class_id)
        for p in range(length, N):
            cond, uncond = (
                next_token_logits(prior, LAYOUT, ids, drawn[i : i + 1, :p])[:, -1:] for ids in (label, null)
            )
            logits = uncond + guidance_values(option.guidance_scale, N)[p] * (cond - uncond)
            logits = filter_logits(logits / option.temperature, top_k=option.top_k, top_p=option.top_p)
            drawn[i : i + 1, p] = draw_tokens(logits, token_uniforms(SEEDS[i : i + 1], 0, N)[:, p : p + 1])[:, 0]
    return drawn


@pytest.mark.slow
def test_cache_and_left_out_null_rows_change_nothing(prior):
    for guidance in (
        1.0,
        2.0,
        GuidanceSchedule("linear", 1.0, 4.0),
        GuidanceSchedule("constant", end=3.0, last_guided_step=4),
        0.0,
    ):
        option = SamplingOptions(guidance_scale=guidance, top_k=9, top_p=0.95, temperature=1.1)
        assert torch.equal(draw(prior, option), tokens_by_definition(prior, [option] * 5))


def test_every_image_has_its_own_options_and_prefix(prior):
    lengths = (0, 3, N, 12, 1)
    drawn = draw(prior, VARIED, prefix=known(PREFIX, lengths))
    assert torch.equal(drawn, tokens_by_definition(prior, VARIED, lengths))
    for i, length in enumerate(lengths):
        assert torch.equal(drawn[i, :length], PREFIX[i, :length])


def test_an_image_depends_on_its_own_seed_alone(prior):
    for options, shared in ((SamplingOptions(guidance_scale=2.0, top_k=9, top_p=0.9), 0), (VARIED, 4), (VARIED, 0)):
        prefix = known(PREFIX[:, :shared]) if shared else None
        together = draw(prior, options, prefix=prefix)
        for order in ([4, 2, 0, 1, 3], [3], [1, 0]):
            assert torch.equal(draw(prior, options, rows=order, prefix=prefix), together[order])


def test_tokens_come_as_soon_as_asked_for(prior):
    option = SamplingOptions(guidance_scale=2.0)
    whole = draw(prior, option)
    for stops in ((1, 2, 12), (0, 4, 4, 8), (5,), ()):
        parts = list(generate_tokens(prior, LAYOUT, LABELS, SEEDS, option, stops=stops))
        assert [part.shape[1] for part in parts] == [b - a for a, b in pairwise((0, *stops))]
        assert torch.equal(torch.cat([whole[:, :0], *parts], dim=1), whole[:, : max(stops, default=0)])


def test_no_later_token_is_computed_before_an_earlier_one_is_handed_over(prior):
    """Every call of the network is counted: a group costs its own tokens, and a known prefix one call."""
    decoder, calls = LlamaDecoder(prior, LAYOUT), []
    prefill, step = decoder.prefill, decoder.step
    decoder.prefill = lambda ids, cache: (calls.append(tuple(ids.shape)), prefill(ids, cache))[1]
    decoder.step = lambda ids, cache: (calls.append(tuple(ids.shape)), step(ids, cache))[1]
    guided = SamplingOptions(guidance_scale=GuidanceSchedule("constant", end=2.0, last_guided_step=6))

    def run(option, prefix=None):
        calls.clear()
        return generate_tokens(prior, LAYOUT, LABELS, SEEDS, option, stops=(4, 8, 12), decoder=decoder, prefix=prefix)

    groups = run(guided)
    assert calls == []
    next(groups)
    assert calls == [(10, 1)] + 3 * [(10,)]
    next(groups)  # tokens 4..6 guided, 7 without null rows
    assert calls[4:] == 3 * [(10,)] + [(5,)]
    list(run(SamplingOptions(), prefix=known(PREFIX[:, :6])))
    assert calls == [(5, 7)] + 5 * [(5,)]
    list(run(guided, prefix=known(PREFIX[:, :7])))
    assert calls == [(5, 8)] + 4 * [(5,)]
    assert torch.equal(torch.cat(list(run(guided, prefix=known(PREFIX))), dim=1), PREFIX)
    assert calls == []


def test_two_requests_may_take_turns(prior):
    decoder, option = LlamaDecoder(prior, LAYOUT), SamplingOptions(guidance_scale=2.0)

    def run(rows):
        labels, seeds = LABELS[rows], [SEEDS[i] for i in rows]
        return generate_tokens(prior, LAYOUT, labels, seeds, option, stops=range(1, N + 1), decoder=decoder)

    in_turn = list(zip(run([0, 1]), run([2, 3, 4]), strict=True))
    for half, rows in enumerate(([0, 1], [2, 3, 4])):
        alone = torch.cat(list(run(rows)), dim=1)
        assert torch.equal(torch.cat([pair[half] for pair in in_turn], dim=1), alone)


def test_guidance_of_one_is_no_guidance_and_whole_filters_are_none(prior):
    plain = draw(prior)
    for same in (
        SamplingOptions(top_k=24),
        SamplingOptions(top_p=1.0),
        SamplingOptions(guidance_scale=(1.0,) * N),
        [SamplingOptions(top_k=24), SamplingOptions(), *[SamplingOptions(top_p=1.0)] * 3],
    ):
        assert torch.equal(draw(prior, same), plain)
    assert not torch.equal(draw(prior, SamplingOptions(guidance_scale=3.0)), plain)


def test_top_k_of_one_and_temperature_near_zero_are_greedy(prior):
    greedy = draw(prior, SamplingOptions(top_k=1))
    assert torch.equal(draw(prior, SamplingOptions(temperature=1e-4)), greedy)
    with torch.no_grad():
        logits = next_token_logits(prior, LAYOUT, LABELS, greedy[:, :-1])
    assert torch.equal(logits.argmax(dim=-1), greedy)


def test_classes_are_never_drawn_even_where_their_rows_are_not_zero():
    prior = tiny_prior()
    with torch.no_grad():
        prior.lm_head.weight[LAYOUT.codebook_size :] = 10 * prior.lm_head.weight[: LAYOUT.num_classes + 1]
    drawn = draw(prior, SamplingOptions(temperature=3.0))
    assert int(drawn.max()) < LAYOUT.codebook_size


def test_weights_in_half_precision_draw_in_fp32(prior):
    """Of the logits that come out in bf16, guidance, softmax and draw are those of fp32 arithmetic, by hand."""
    half = tiny_prior().to(torch.bfloat16)
    drawn = draw(half, SamplingOptions(guidance_scale=1.7))
    decoder = LlamaDecoder(half, LAYOUT, num_rows=2 * len(LABELS))
    cache = decoder.new_cache(2 * len(LABELS))
    labels = torch.cat([LABELS, torch.full_like(LABELS, LAYOUT.null_class_id)])
    logits = decoder.prefill(LAYOUT.class_token(labels).unsqueeze(1), cache)
    uniforms = token_uniforms(SEEDS, 0, N)
    scale = torch.where(LABELS == LAYOUT.null_class_id, 1.0, 1.7).unsqueeze(1)
    for position in range(N):
        assert logits.dtype == torch.float32
        cond, uncond = logits.double().chunk(2)
        below = (uncond + scale * (cond - uncond)).softmax(dim=-1).cumsum(dim=-1)
        by_hand = (below <= uniforms[:, position : position + 1]).sum(dim=-1)
        assert torch.equal(by_hand, drawn[:, position])
        logits = decoder.step(drawn[:, position].repeat(2), cache)


def test_tokens_are_ordinary_tensors_and_the_prefix_is_not_modified(prior):
    before = PREFIX.clone()
    parts = list(
        generate_tokens(prior, LAYOUT, LABELS, SEEDS, SamplingOptions(), stops=(4, N), prefix=known(PREFIX[:, :6]))
    )
    assert torch.equal(PREFIX, before)
    assert not any(part.is_inference() for part in parts)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_unlabelled_models_draw():
    layout = TokenLayout(codebook_size=8, num_classes=0, num_tokens=6)
    (tokens,) = generate_tokens(
        tiny_prior(layout), layout, torch.tensor([0, 0]), SEEDS[:2], SamplingOptions(guidance_scale=3.0), stops=[6]
    )
    assert tokens.shape == (2, 6)


def test_bad_arguments_raise_before_the_first_token_is_asked_for(prior):
    good = {"class_labels": LABELS, "image_seeds": SEEDS, "options": SamplingOptions(), "stops": (N,)}
    for arguments, said in [
        ({"options": SamplingOptions(guidance_scale=(2.0, 2.0))}, "one value per step"),
        ({"options": [SamplingOptions()] * 4}, "per image, got 4"),
    ]:
        with pytest.raises(UserError, match=said):
            generate_tokens(prior, LAYOUT, **(good | arguments))


def test_what_lies_behind_a_shorter_prefix_is_not_looked_at(prior):
    padded = PREFIX.clone()
    padded[:, 3:] = -1
    lengths = [3, 0, 3, 2, 3]
    assert torch.equal(
        draw(prior, prefix=known(padded.where(torch.arange(N) < 3, -1), lengths)),
        draw(prior, prefix=known(PREFIX, lengths)),
    )
