"""What tokens of a next-token model cost, and how images are read under many classes at once."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from isthmus.dar.likelihood import log_likelihood, score_classes
from isthmus.dar.prior import TokenLayout, next_token_logits
from tests.dar.tiny_prior import LAYOUT, tiny_prior


def test_all_sequences_together_have_probability_one():
    layout = TokenLayout(codebook_size=3, num_classes=1, num_tokens=3)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=3)))
    for label in (0, 1):
        log_p = log_likelihood(tiny_prior(layout), layout, sequences, torch.full((27,), label)).sum(dim=1)
        assert_close(log_p.exp().sum(), torch.tensor(1.0))


def test_a_token_costs_what_the_logits_before_it_say():
    prior, labels = tiny_prior(), torch.tensor([1, 3])
    token_ids = torch.randint(24, (2, 12), generator=torch.Generator().manual_seed(0))
    log_p = log_likelihood(prior, LAYOUT, token_ids, labels)
    for p in range(12):
        logits = next_token_logits(prior, LAYOUT, labels, token_ids[:, :p])[:, -1].log_softmax(dim=-1)
        assert_close(log_p[:, p], logits.gather(1, token_ids[:, p : p + 1])[:, 0].detach())
    assert_close(log_likelihood(prior, LAYOUT, token_ids[:, :5], labels), log_p[:, :5])


ROWS = torch.randint(24, (6, LAYOUT.num_tokens), generator=torch.Generator().manual_seed(0))
WORDY = TokenLayout(LAYOUT.codebook_size, LAYOUT.num_classes, LAYOUT.num_tokens, num_words=9, prompt_length=4)
WORDS = WORDY.padded([[1, 2, 3], [], [8]])


def score(layout=LAYOUT, **rule):
    """Three images in two views each under three classes, of a model with words each with a prompt of its own."""
    words = WORDS if layout is WORDY else None
    return score_classes(
        tiny_prior(layout), layout, ROWS, [2, 0, 1], tokens_per_group=4, num_views=2, words=words, **rule
    )


@pytest.mark.parametrize("layout", [LAYOUT, WORDY])
def test_what_goes_on_is_scored_as_if_alone(layout):
    """Pruned scores are the sums over the first groups, whichever other classes and images are there."""
    scores, words = score(layout, margin_nats=0.5, keep=2), WORDS if layout is WORDY else None
    for column, label in enumerate([2, 0, 1]):
        own = None if words is None else words.rows(torch.full((6,), column))
        nats = log_likelihood(tiny_prior(layout), layout, ROWS, torch.full((6,), label), own)
        for image, groups in enumerate(scores.stages[:, column].tolist()):
            both = nats[2 * image : 2 * image + 2, : 4 * groups].sum(dim=1)
            assert_close(scores.nats[image, column], both.mean(), atol=1e-4, rtol=0)
    # after groups of 4, 4, and what is left: as many
    last = LAYOUT.num_tokens // 4
    assert bool(((scores.stages == last).sum(dim=1) >= 2).all()) and bool((scores.stages < last).any())
    assert torch.equal(scores.tokens, 2 * 4 * scores.stages.sum(dim=1))


@pytest.mark.parametrize("layout", [LAYOUT, WORDY])
@pytest.mark.parametrize("tokens_at_once", [1, 100])
def test_the_size_of_a_pass_changes_no_answer(layout, tokens_at_once):
    whole, parts = (score(layout, margin_nats=0.5, tokens_at_once=most) for most in (None, tokens_at_once))
    assert_close(parts.nats, whole.nats, atol=1e-4, rtol=0)
    assert torch.equal(parts.stages, whole.stages) and torch.equal(parts.order, whole.order)
    assert bool((parts.tokens >= whole.tokens).all())
