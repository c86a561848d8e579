import itertools

import torch
from torch.testing import assert_close

from isthmus.dar.prior import TokenLayout, next_token_logits
from isthmus.dar.sampling import log_likelihood
from tests.generation.tiny_prior import LAYOUT, tiny_prior


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
