"""Bayes over exact likelihoods: pruning only leaves out, smoothing only averages, evidence only adds up."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from isthmus.next_scale.likelihood import (
    diffusion_bound,
    evidence_map,
    score_classes,
    signal_to_noise,
    token_evidence,
    token_log_likelihood,
)
from isthmus.next_scale.pyramid import ScaleSchedule, next_scale_input
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from tests.pipelines.tiny import tiny_pipeline

CODES, SIZES = 3, (1, 2)


def tiny_pair(attention, num_classes):
    """3 codes on scales 1 and 2: 3 * 3^4 = 243 pyramids, all of which can be written down."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = MultiScaleVQVAE(
            codebook_size=CODES, codebook_dim=4, scale_sizes=SIZES, base_channels=32, channel_multipliers=(1,),
            num_res_blocks=1,
        )  # fmt: skip
        transformer = NextScaleTransformer(
            scale_sizes=SIZES, codebook_size=CODES, codebook_dim=4, width=8, num_layers=2, num_heads=2,
            num_classes=num_classes, scale_attention=attention, init_gate=1.0, init_modulation=1.0,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    # float64: the law is held to 1e-6
    return tokenizer.eval(), transformer.eval().double()


FIRST = torch.tensor(list(itertools.product(range(CODES), repeat=1)))
PYRAMIDS = torch.tensor(list(itertools.product(range(CODES), repeat=5)))


@torch.no_grad()
def reverse_matrices(tokenizer, transformer, label, *, late=False):
    """p(x_1 | x_0) and p(x_2 | x_1) as matrices over all states, from `forward_scale`.

    `late` plants a fault: scale 1 reads the input of one scale too late, the features before x_1.
    """
    labels = torch.full((CODES,), label)
    conditioning, cache = transformer.condition(labels), transformer.new_cache(CODES)
    empty = torch.zeros(CODES, 0, 4, dtype=torch.float64)
    start = torch.zeros(CODES, 4, 2, 2)
    first = transformer.forward_scale(0, empty, conditioning, cache).softmax(dim=-1)[:1, 0]
    state = start if late else tokenizer.add_codes(start, tokenizer.lookup(FIRST), 0)
    inputs = next_scale_input(state, tokenizer.schedule, 1).double()
    second = transformer.forward_scale(1, inputs, conditioning, cache).softmax(dim=-1)
    step = torch.zeros(CODES, len(PYRAMIDS), dtype=torch.float64)
    for column, pyramid in enumerate(PYRAMIDS):
        # a state keeps what it has: x_2 continues one x_1 only
        row = int(pyramid[0])
        step[row, column] = torch.stack([second[row, j, pyramid[1 + j]] for j in range(4)]).prod()
    return first, step


def forward_matrices():
    """M as 0/1 matrices that truncate every pyramid: (x_2 to x_1) and (x_1 to x_0)."""
    drop_second = (PYRAMIDS[:, :1] == FIRST.T).double()
    return drop_second, torch.ones(CODES, 1, dtype=torch.float64)


def kl(q, p):
    return torch.where(q > 0, q * (q.clamp(min=1e-300) / p).log(), 0.0).sum()


def bound_by_matrices(reverse, index):
    """Prior KL, KL of the step, reconstruction, for pyramid `index`; posteriors by Bayes from the forward matrices."""
    drop_second, drop_first = forward_matrices()
    to_first, to_second = reverse
    q1 = drop_second[index]  # q(x_1 | image)
    q0 = q1 @ drop_first  # q(x_0 | image)
    prior = kl(q0, torch.ones(1, dtype=torch.float64))
    # q(x_1 | x_0, image) = q(x_0 | x_1) q(x_1 | image) / q(x_0 | image)
    posterior = drop_first[:, 0] * q1 / q0
    step = kl(posterior, to_first[0])
    reconstruction = -to_second[q1 == 1, index].log().sum()
    return prior, step, reconstruction


@pytest.mark.parametrize(("attention", "num_classes"), [("markov", 2), ("causal", 2), ("causal", 0)])
def test_the_law_on_everything_that_can_happen(attention, num_classes):
    tokenizer, transformer = tiny_pair(attention, num_classes)
    pyramids = [PYRAMIDS[:, :1], PYRAMIDS[:, 1:]]
    for label in range(num_classes + 1):
        labels = torch.full((len(PYRAMIDS),), label)
        log_p = token_log_likelihood(tokenizer, transformer, pyramids, labels).sum(dim=1)
        bound = diffusion_bound(tokenizer, transformer, pyramids, labels)
        reverse = reverse_matrices(tokenizer, transformer, label)
        chain = (reverse[0] @ reverse[1])[0]
        for total in (log_p.exp().sum(), chain.sum(), *(m.sum(dim=1) for m in reverse)):
            assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
        assert_close(bound.elbo, log_p, atol=1e-6, rtol=0)
        assert_close(chain.log(), log_p, atol=1e-6, rtol=0)
        for index in range(0, len(PYRAMIDS), 17):
            prior, step, reconstruction = bound_by_matrices(reverse, index)
            assert prior == 0 == bound.prior[index]
            assert_close(step, bound.steps[index].sum(), atol=1e-6, rtol=0)
            assert_close(reconstruction, bound.reconstruction[index], atol=1e-6, rtol=0)
            assert_close(prior + step + reconstruction, -log_p[index], atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_an_input_one_scale_too_late_breaks_the_law(attention):
    tokenizer, transformer = tiny_pair(attention, 0)
    pyramids = [PYRAMIDS[:, :1], PYRAMIDS[:, 1:]]
    log_p = token_log_likelihood(tokenizer, transformer, pyramids, torch.zeros(len(PYRAMIDS), dtype=torch.long))
    first, second = reverse_matrices(tokenizer, transformer, 0, late=True)
    assert ((first @ second)[0].log() - log_p.sum(dim=1)).abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["markov", "causal"])
def test_the_bound_in_steps_is_the_likelihood_in_one_pass(attention):
    pipe = tiny_pipeline(scale_attention=attention)
    tokens = [torch.randint(16, (5, n), generator=torch.Generator().manual_seed(n)) for n in pipe.schedule.lengths]
    labels = torch.tensor([0, 1, 2, 3, 0])
    nats = token_log_likelihood(pipe.image_tokenizer, pipe.transformer, tokens, labels)
    bound = diffusion_bound(pipe.image_tokenizer, pipe.transformer, tokens, labels)
    assert_close(bound.elbo, nats.sum(dim=1))
    by_scale = torch.stack([part.sum(dim=1) for part in nats.split(list(pipe.schedule.lengths), dim=1)], dim=1)
    assert_close(torch.cat([bound.steps, bound.reconstruction[:, None]], dim=1), -by_scale)


def test_noise_is_what_is_left_of_the_latents():
    pipe = tiny_pipeline()
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = signal_to_noise(pipe.image_tokenizer, latents)
    tokens = pipe.image_tokenizer.requantize(latents)
    for scale in range(3):
        rest = latents - pipe.image_tokenizer.features_up_to(tokens, scale).detach()
        expected = 10 * torch.log10(latents.square().sum((1, 2, 3)) / rest.square().sum((1, 2, 3)))
        assert_close(found[:, scale], expected)


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
CLASSES = [0, 1, 2]


@pytest.fixture(scope="module", params=["markov", "causal"])
def pipe(request):
    return tiny_pipeline(scale_attention=request.param)


def tokens_of(pipe, images=IMAGES):
    with torch.no_grad():
        return pipe.image_tokenizer.encode(images).token_ids


def score(pipe, token_ids, candidates=CLASSES, **rule):
    return score_classes(pipe.image_tokenizer, pipe.transformer, token_ids, candidates, **rule)


def exact(pipe, token_ids, candidates=CLASSES):
    """(b, candidates) by one teacher-forced pass per class."""
    each = [torch.full((len(token_ids[0]),), one) for one in candidates]
    parts = [token_log_likelihood(pipe.image_tokenizer, pipe.transformer, token_ids, labels) for labels in each]
    return torch.stack([part.sum(dim=1) for part in parts], dim=1)


def test_without_pruning_it_is_bayes_rule(pipe):
    token_ids = tokens_of(pipe)
    scores, nats = score(pipe, token_ids), exact(pipe, token_ids)
    assert_close(scores.nats, nats, atol=1e-4, rtol=0)
    assert_close(scores.probabilities, nats.softmax(dim=1), atol=1e-4, rtol=0)
    assert bool((scores.stages == 3).all()) and scores.tokens.tolist() == [3 * 21] * 5


@pytest.mark.parametrize(("keep", "margin"), [(2, 0.0), (1, 0.5), (1, 3.0)])
def test_what_goes_on_is_scored_as_if_alone(pipe, keep, margin):
    """Pruned scores are the sums over the first scales, whichever other classes and images are there."""
    token_ids = tokens_of(pipe)
    scores = score(pipe, token_ids, keep=keep, margin_nats=margin)
    lengths = [1, 4, 16]
    for image in range(5):
        for column, label in enumerate(CLASSES):
            nats = token_log_likelihood(
                pipe.image_tokenizer, pipe.transformer, [ids[image : image + 1] for ids in token_ids],
                torch.tensor([label]),
            )  # fmt: skip
            seen = sum(lengths[: int(scores.stages[image, column])])
            assert_close(scores.nats[image, column], nats[0, :seen].sum(), atol=1e-4, rtol=0)
    alone = score(pipe, [ids[2:3] for ids in token_ids], keep=keep, margin_nats=margin)
    assert torch.equal(alone.stages, scores.stages[2:3])
    if keep == 2:
        assert bool(((scores.stages == 3).sum(dim=1) >= 2).all())
    spent = (scores.stages.unsqueeze(-1) > torch.arange(3)).float() @ torch.tensor(lengths).float()
    assert_close(scores.tokens.float(), spent.sum(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens_at_once", "rule"),
    [
        (1, {"keep": 2, "margin_nats": 0.0}), (30, {}), (200, {"keep": 1, "margin_nats": 0.5}),
        (10**6, {"keep": 2, "margin_nats": 0.0}),
    ],
)  # fmt: skip
def test_the_size_of_a_pass_bounds_memory_and_changes_no_answer(pipe, tokens_at_once, rule):
    both = [torch.cat([ids, ids.flip(0)]) for ids in tokens_of(pipe)]
    whole = score(pipe, both, num_views=2, **rule)
    read = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda block, inputs: read.append(inputs[0].shape[:2]))
    parts = score(pipe, both, num_views=2, tokens_at_once=tokens_at_once, **rule)
    hook.remove()
    assert_close(parts.nats, whole.nats, atol=1e-4, rtol=0)
    assert torch.equal(parts.stages, whole.stages) and torch.equal(parts.order, whole.order)
    # one pair of views at least
    assert all(rows * tokens <= max(tokens_at_once, 2 * 16) and (rows <= 2 or rows * tokens <= tokens_at_once)
               for rows, tokens in read)  # fmt: skip
    if pipe.transformer.is_markov or tokens_at_once == 10**6:
        assert torch.equal(parts.tokens, whole.tokens)
    else:
        assert bool((parts.tokens >= whole.tokens).all())


def test_a_wide_margin_drops_nothing(pipe):
    token_ids = tokens_of(pipe)
    assert_close(score(pipe, token_ids, margin_nats=1e6).nats, score(pipe, token_ids).nats)


def test_views_are_averaged(pipe):
    first, second = tokens_of(pipe, IMAGES[:2]), tokens_of(pipe, IMAGES[2:4])
    both = [torch.stack([a, b], dim=1).flatten(0, 1) for a, b in zip(first, second, strict=True)]
    scores = score(pipe, both, num_views=2)
    assert_close(scores.nats, (exact(pipe, first) + exact(pipe, second)) / 2, atol=1e-4, rtol=0)
    assert scores.tokens.tolist() == [2 * 3 * 21] * 2


@given(st.sampled_from([(1, 2, 4), (1, 2, 3, 5), (2, 3, 7), (1,)]), st.integers(0, 10**6))
def test_a_map_has_the_sum_of_its_tokens(sizes, seed):
    schedule = ScaleSchedule(sizes, (0,) * len(sizes))
    evidence = torch.randn(2, schedule.num_tokens, generator=torch.Generator().manual_seed(seed))
    spread = evidence_map(evidence, schedule)
    assert spread.shape == (2, sizes[-1], sizes[-1])
    assert_close(spread.sum(dim=(1, 2)), evidence.sum(dim=1), atol=1e-4, rtol=0)
    last = torch.zeros_like(evidence)
    last[:, -1] = 1
    assert_close(evidence_map(last, schedule)[:, -1, -1], torch.ones(2))


def test_evidence_sums_to_the_likelihood_ratio(pipe):
    token_ids = tokens_of(pipe)
    labels = torch.tensor([0, 1, 2, 0, 1])
    ratio = exact(pipe, token_ids).gather(1, labels[:, None])[:, 0] - exact(pipe, token_ids, [3])[:, 0]
    evidence = token_evidence(pipe.image_tokenizer, pipe.transformer, token_ids, labels)
    assert_close(evidence.sum(dim=1), ratio, atol=1e-4, rtol=0)
    assert not bool(token_evidence(pipe.image_tokenizer, pipe.transformer, token_ids, torch.full((5,), 3)).any())
