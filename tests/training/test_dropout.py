"""Dropout that belongs to positions, and goes into a Llama and out of it without a trace."""

import pytest
import torch

from isthmus.dar.prior import TokenLayout, new_prior, next_token_logits, next_token_loss
from isthmus.dar.train_prior import (
    NextTokenObjective,
    ResidualDropout,
    embedding_seeds,
    residual_seeds,
    sample_dropout,
)
from tests.testers import NETWORK, randomized

LAYOUT = TokenLayout(codebook_size=16, num_classes=3, num_tokens=6)
LABELS, TOKENS = torch.tensor([0, 3]), torch.arange(12).view(2, 6)


@pytest.fixture
def llama():
    return randomized(new_prior(LAYOUT, width=16, num_layers=2, num_heads=2, feed_forward_width=32))


def test_masks_belong_to_samples_and_keep_the_mean():
    x = torch.ones(3, 50, 40)
    dropped = sample_dropout(x, 0.25, [5, 6, 7])
    assert torch.equal(dropped[1:], sample_dropout(x[1:], 0.25, [6, 7]))
    assert not torch.equal(dropped[0], dropped[1])
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    # 6,000 coins: four standard deviations of the mean are 0.03
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)


def test_seeds_differ_by_position_layer_and_branch():
    positions = torch.tensor([3, 9])
    seeds = residual_seeds(positions, 4, seed=0)
    assert seeds.shape == (2, 4, 2) and len(seeds.unique()) == 16
    assert torch.equal(seeds[1:], residual_seeds(positions[1:], 4, seed=0))
    assert embedding_seeds(positions, seed=0)[1] == embedding_seeds(positions[1:], seed=0)[0]
    assert not set(embedding_seeds(positions, seed=0)) & set(seeds.flatten().tolist())


def test_the_objective_is_the_cross_entropy_over_codes(llama):
    losses = NextTokenObjective(llama, LAYOUT)(LABELS, TOKENS)
    logits = next_token_logits(llama, LAYOUT, LABELS, TOKENS[:, :-1])
    torch.testing.assert_close(losses.nats, next_token_loss(logits, TOKENS), **NETWORK)
    torch.testing.assert_close(losses.total, losses.nats.mean())
    assert torch.equal(losses.hits, logits.argmax(dim=-1) == TOKENS)


def test_head_rows_of_classes_get_no_gradient(llama):
    NextTokenObjective(llama.train(), LAYOUT)(LABELS, TOKENS).total.backward()
    gradient = llama.lm_head.weight.grad
    assert not gradient[16:].any() and gradient[:16].any(dim=1).all()
    # the classes that were read do get one as words
    assert llama.model.embed_tokens.weight.grad[[16, 19]].any(dim=1).all()


def test_embeddings_are_dropped_in_training_only(llama):
    objective = NextTokenObjective(llama, LAYOUT, embedding_dropout=0.5)
    plain = objective.eval()(LABELS, TOKENS, [1, 2]).nats
    assert torch.equal(plain, objective.train()(LABELS, TOKENS).nats)
    dropped = objective(LABELS, TOKENS, [1, 2]).nats
    assert not torch.equal(plain, dropped) and torch.equal(dropped, objective(LABELS, TOKENS, [1, 2]).nats)


def test_hooks_change_what_is_added_and_leave_no_trace(llama):
    objective, dropout = NextTokenObjective(llama, LAYOUT), ResidualDropout(llama, 0.5)
    before = objective(LABELS, TOKENS).nats
    with dropout.attached():
        dropout.seeds = residual_seeds(torch.tensor([0, 1]), 2, seed=0)
        whole = objective(LABELS, TOKENS).nats
        dropout.seeds = residual_seeds(torch.tensor([1]), 2, seed=0)
        single = objective(LABELS[1:], TOKENS[1:]).nats
    assert not torch.equal(whole, before)
    torch.testing.assert_close(single, whole[1:], **NETWORK)
    assert torch.equal(objective(LABELS, TOKENS).nats, before)
    assert not any(module._forward_hooks for module in llama.modules())


def test_hooks_are_gone_after_an_error_and_a_rate_of_zero_attaches_none(llama):
    with pytest.raises(ZeroDivisionError), ResidualDropout(llama, 0.5).attached():
        raise ZeroDivisionError
    with ResidualDropout(llama, 0.0).attached():
        assert not any(module._forward_hooks for module in llama.modules())


def test_recomputed_activations_have_the_same_gradients(llama):
    objective, dropout = NextTokenObjective(llama.train(), LAYOUT), ResidualDropout(llama, 0.5)
    gradients = []
    with dropout.attached():
        for recomputes in (False, True):
            if recomputes:
                objective.enable_gradient_checkpointing()
            dropout.seeds = residual_seeds(torch.tensor([0, 1]), 2, seed=0)
            llama.zero_grad()
            objective(LABELS, TOKENS).total.backward()
            gradients.append([p.grad.clone() for p in llama.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
