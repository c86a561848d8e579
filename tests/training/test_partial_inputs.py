from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from isthmus.next_scale.train_prior import PartlyShown, next_scale_loss, partial_inputs, partly_shown, scale_weights
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.pipelines.tiny import tiny_pipeline
from tests.training.tiny_runs import prior_run, tokenizer_run, write_images

LENGTHS = (1, 4, 16)


@settings(max_examples=25, deadline=None)
@given(positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=6), probability=st.floats(0, 1))
def test_every_scale_of_every_image_counts_something(positions, probability):
    shown = partly_shown(torch.tensor(positions), LENGTHS, probability=probability, seed=3)
    for counted, marked, shows in zip(
        shown.counted.split(LENGTHS, dim=1), shown.marked.split(LENGTHS, dim=1), shown.shows.T, strict=True
    ):
        assert bool(counted.any(dim=1).all())
        assert torch.equal(counted, torch.where(shows[:, None], marked, True))
        assert not bool(marked[~shows].any())
    assert not bool(shown.shows[:, 0].any())
    for i, position in enumerate(positions):
        alone = partly_shown(torch.tensor([position]), LENGTHS, probability=probability, seed=3)
        assert torch.equal(alone.marked[0], shown.marked[i]) and torch.equal(alone.shows[0], shown.shows[i])


def test_the_probability_is_the_share_of_scales_that_show_tokens():
    shown = partly_shown(torch.arange(500), LENGTHS, probability=0.3, seed=0)
    assert shown.shows[:, 1:].float().mean() == pytest.approx(0.3, abs=0.06)


def test_of_a_causal_models_images_one_scale_shows_tokens():
    """As many images as asked, each scale as often, and an image alone as among others."""
    shown = partly_shown(torch.arange(500), LENGTHS, probability=0.4, seed=0, one_scale=True)
    assert int(shown.shows.sum(dim=1).max()) == 1 and not bool(shown.shows[:, 0].any())
    assert shown.shows.any(dim=1).float().mean() == pytest.approx(0.4, abs=0.07)
    assert shown.shows.float().mean(dim=0)[1:].tolist() == pytest.approx([0.2, 0.2], abs=0.06)
    assert torch.equal(
        shown.counted, torch.where(shown.shows.repeat_interleave(torch.tensor(LENGTHS), 1), shown.marked, True)
    )
    alone = partly_shown(torch.tensor([77]), LENGTHS, probability=0.4, seed=0, one_scale=True)
    assert torch.equal(alone.marked[0], shown.marked[77]) and torch.equal(alone.shows[0], shown.shows[77])
    assert not bool(partly_shown(torch.arange(9), (4,), probability=1.0, seed=0, one_scale=True).shows.any())


def tokens_of(batch):
    return [torch.randint(16, (batch, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def test_without_shown_tokens_the_inputs_are_the_ordinary_ones():
    tokenizer, tokens = tiny_pipeline().image_tokenizer, tokens_of(4)
    shown = partly_shown(torch.arange(4), LENGTHS, probability=0.0, seed=0)
    inputs = partial_inputs(tokenizer, tokens, shown, tokenizer.schedule)
    assert torch.equal(inputs, tokenizer.scale_inputs(tokens)) and bool(shown.counted.all())


def test_no_leak():
    """What the loss is on reaches no input that it is predicted from."""
    tokenizer, tokens = tiny_pipeline().image_tokenizer, tokens_of(4)
    shown = partly_shown(torch.arange(4), LENGTHS, probability=1.0, seed=0)
    inputs = partial_inputs(tokenizer, tokens, shown, tokenizer.schedule)
    hidden, offsets = shown.counted.split(LENGTHS, dim=1), tokenizer.schedule.offsets
    for scale in (1, 2):
        changed = list(tokens)
        changed[scale] = torch.where(hidden[scale], (tokens[scale] + 1) % 16, tokens[scale])
        again = partial_inputs(tokenizer, changed, shown, tokenizer.schedule)
        own = slice(offsets[scale] - 1, offsets[scale + 1] - 1)
        assert torch.equal(again[:, own], inputs[:, own])


def test_the_loss_is_on_hidden_tokens():
    schedule = tiny_pipeline().schedule
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(3, 21, 16, generator=generator), torch.randint(16, (3, 21), generator=generator)
    shown = partly_shown(torch.arange(3), LENGTHS, probability=0.7, seed=1)
    weights = scale_weights("token-uniform", schedule.sizes)
    found = next_scale_loss(logits, ids, schedule, weights, scales=(0, 1, 2), counted=shown.counted)
    nats = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    for scale in range(3):
        cut = slice(schedule.offsets[scale], schedule.offsets[scale + 1])
        expected = torch.stack([nats[i, cut][shown.counted[i, cut]].mean() for i in range(3)]).mean()
        assert_close(found.by_scale[scale], expected)
    plain = next_scale_loss(logits, ids, schedule, weights, scales=(0, 1, 2))
    every = torch.ones(3, 21, dtype=torch.bool)
    assert_close(next_scale_loss(logits, ids, schedule, weights, scales=(0, 1, 2), counted=every).total, plain.total)


def test_marks_move_the_mask_embedding_alone_where_tokens_are_hidden():
    pipe = tiny_pipeline()
    arguments = {k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    model = type(pipe.transformer)(**(arguments | {"has_mask_embedding": True})).eval()
    model.load_state_dict(pipe.transformer.state_dict() | {"mask_embedding": torch.zeros(16)})
    tokens, labels = tokens_of(2), torch.tensor([0, 1])
    inputs = pipe.image_tokenizer.scale_inputs(tokens)
    shown: PartlyShown = partly_shown(torch.arange(2), LENGTHS, probability=1.0, seed=0)
    marks = shown.marked[:, 1:]
    plain = pipe.transformer(labels, inputs).logits
    assert torch.equal(model(labels, inputs, hidden=marks).logits, plain)  # zero at the start
    torch.nn.init.normal_(model.mask_embedding)
    assert torch.equal(model(labels, inputs).logits, plain)
    assert not torch.allclose(model(labels, inputs, hidden=marks).logits, plain)
    model(labels, inputs, hidden=marks).logits.sum().backward()
    assert bool(model.mask_embedding.grad.abs().sum() > 0)


@pytest.mark.slow
def test_a_prior_trained_for_refinement_loads_and_goes_on(tmp_path):
    data = write_images(tmp_path / "images.npz")
    tokenizer = train_tokenizer(tokenizer_run(data, tmp_path / "tokenizer"))
    run = prior_run(data, tmp_path / "prior", tokenizer, refinement_probability=0.5)
    model = load_pipeline(train_prior(run), device="cpu")
    assert model.transformer.config["has_mask_embedding"] and bool(model.transformer.mask_embedding.abs().sum() > 0)
    plain = train_prior(replace(run, out=tmp_path / "plain", refinement_probability=0.0))
    assert not load_pipeline(plain, device="cpu").transformer.config["has_mask_embedding"]
    tuned = replace(run, out=tmp_path / "tuned", tokenizer="", from_model=str(plain), model=replace(run.model))
    assert load_pipeline(train_prior(tuned), device="cpu").transformer.config["has_mask_embedding"]
