"""Bayes over exact likelihoods: pruning only leaves out, smoothing only averages, evidence only adds up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from isthmus.next_scale.likelihood import (
    ClassScores,
    evidence_map,
    perturbed_views,
    score_classes,
    surviving,
    token_evidence,
    token_log_likelihood,
)
from isthmus.next_scale.pyramid import ScaleSchedule
from tests.pipelines.tiny import tiny_pipeline

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
    assert bool((scores.scales == 3).all()) and scores.tokens.tolist() == [3 * 21] * 5


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
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
            seen = sum(lengths[: int(scores.scales[image, column])])
            assert_close(scores.nats[image, column], nats[0, :seen].sum(), atol=1e-4, rtol=0)
    alone = score(pipe, [ids[2:3] for ids in token_ids], keep=keep, margin_nats=margin)
    assert torch.equal(alone.scales, scores.scales[2:3])
    if keep == 2:
        assert bool(((scores.scales == 3).sum(dim=1) >= 2).all())
    spent = (scores.scales.unsqueeze(-1) > torch.arange(3)).float() @ torch.tensor(lengths).float()
    assert_close(scores.tokens.float(), spent.sum(dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("tokens_at_once", [1, 30, 200, 10**6])
@pytest.mark.parametrize("rule", [{}, {"keep": 1, "margin_nats": 0.5}, {"keep": 2, "margin_nats": 0.0}])
def test_the_size_of_a_pass_bounds_memory_and_changes_no_answer(pipe, tokens_at_once, rule):
    both = [torch.cat([ids, ids.flip(0)]) for ids in tokens_of(pipe)]
    whole = score(pipe, both, num_views=2, **rule)
    read = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda block, inputs: read.append(inputs[0].shape[:2]))
    parts = score(pipe, both, num_views=2, tokens_at_once=tokens_at_once, **rule)
    hook.remove()
    assert_close(parts.nats, whole.nats, atol=1e-4, rtol=0)
    assert torch.equal(parts.scales, whole.scales) and torch.equal(parts.order, whole.order)
    # one pair of views at least
    assert all(rows * tokens <= max(tokens_at_once, 2 * 16) and (rows <= 2 or rows * tokens <= tokens_at_once)
               for rows, tokens in read)  # fmt: skip
    if pipe.transformer.is_markov or tokens_at_once == 10**6:
        assert torch.equal(parts.tokens, whole.tokens)
    else:
        assert bool((parts.tokens >= whole.tokens).all())


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_classes_looked_at_to_the_end_come_first_and_keep_their_order(seed, keep):
    """The order among survivors is the exact one, and no dropped class is more probable than a survivor."""
    generator = torch.Generator().manual_seed(seed)
    gains, alive = torch.randn(4, 4, 6, generator=generator) * 3, torch.ones(4, 6, dtype=torch.bool)
    nats, below, scales = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.long)
    for gain in gains:
        nats, scales = nats + gain * alive, scales + alive
        below = torch.where(alive, nats.masked_fill(~alive, -torch.inf).amax(1, keepdim=True) - nats, below)
        if len(gains) > int(scales.max()):
            alive = surviving(nats, alive, keep=keep, margin_nats=2.0)
    scores = ClassScores(nats, scales, below, torch.zeros(4, dtype=torch.long))
    for row in range(4):
        survived = alive[row].nonzero().flatten()
        exact_order = survived[nats[row, survived].argsort(descending=True)]
        assert torch.equal(scores.order[row, : len(survived)], exact_order)
        ranked = scores.probabilities[row, scores.order[row]]
        assert bool((ranked.diff() <= 0).all()) and abs(float(ranked.sum()) - 1) < 1e-5


def test_a_class_that_was_dropped_near_the_best_does_not_overtake():
    """Dropped at the first scale 1 nat below; the second survivor ends 5 nats below, and is still the second."""
    scores = ClassScores(
        torch.tensor([[-1.0, -6.0, -2.0]]),
        torch.tensor([[3, 3, 1]]),
        torch.tensor([[0.0, 5.0, 1.0]]),
        torch.tensor([7]),
    )
    assert scores.order.tolist() == [[0, 1, 2]]
    assert_close(scores.probabilities, torch.tensor([[0.0, -5.0, -5.0]]).softmax(dim=1))


def test_a_wide_margin_drops_nothing(pipe):
    token_ids = tokens_of(pipe)
    assert_close(score(pipe, token_ids, margin_nats=1e6).nats, score(pipe, token_ids).nats)


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 5))
def test_survivors_are_the_best_of_those_alive(seed, keep, margin):
    generator = torch.Generator().manual_seed(seed)
    nats = torch.randn(4, 6, generator=generator) * 3
    alive = torch.rand(4, 6, generator=generator) < 0.7
    alive[:, 0] = True
    going_on = surviving(nats, alive, keep=keep, margin_nats=margin)
    assert not bool((going_on & ~alive).any())
    for row, before, after in zip(nats, alive, going_on, strict=True):
        assert int(after.sum()) >= min(keep, int(before.sum()))
        dropped = before & ~after
        if bool(dropped.any()):
            assert row[dropped].max() <= row[after].min()
            assert row[dropped].max() < row[before].max() - margin


def test_views_are_averaged(pipe):
    first, second = tokens_of(pipe, IMAGES[:2]), tokens_of(pipe, IMAGES[2:4])
    both = [torch.stack([a, b], dim=1).flatten(0, 1) for a, b in zip(first, second, strict=True)]
    scores = score(pipe, both, num_views=2)
    assert_close(scores.nats, (exact(pipe, first) + exact(pipe, second)) / 2, atol=1e-4, rtol=0)
    assert scores.tokens.tolist() == [2 * 3 * 21] * 2


def test_perturbed_views_depend_on_their_own_seed_and_start_with_the_image():
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    seeds = [(5, 0), (5, 1), (5, 2)]
    views = perturbed_views(latents, seeds, num_views=3, noise=0.5).unflatten(0, (3, 3))
    assert torch.equal(views[:, 0], latents)
    alone = perturbed_views(latents[1:2], seeds[1:2], num_views=3, noise=0.5)
    assert torch.equal(alone, views[1])
    assert not torch.equal(views[0, 1], views[0, 2])
    spread = (views[:, 1:] - latents[:, None]).std() / latents.std()
    assert 0.4 < float(spread) < 0.6


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
