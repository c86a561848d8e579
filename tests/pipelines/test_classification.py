"""Classification as a pipeline offers it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.pictures import heat_map
from isthmus.pipelines.classification import CandidateScores, perturbed_views, surviving
from tests.pipelines.conftest import labelled
from tests.pipelines.tiny import tiny_pipeline, tiny_text_pipeline
from tests.pipelines.tiny_dar import WORDS, tiny_dar

IMAGES = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


PROMPTS = ["a critter with a dome body", "", "a body", "a critter with a dome with a dome with a body"]


@pytest.fixture(params=["markov", "causal", "dar"])
def either(request):
    """A labelled model of either family, with both kinds of attention."""
    return tiny_dar() if request.param == "dar" else labelled(request.param)


def test_it_is_the_argmax_of_log_prob(either):
    result = either.classify(IMAGES, top_k=3, prune_nats=None)
    nats = torch.stack([either.log_prob(IMAGES, label) for label in range(3)], dim=1)
    assert torch.equal(result.class_labels, nats.argsort(dim=1, descending=True))
    assert_close(result.scores.nats, nats, atol=1e-4, rtol=0)
    assert result.names[0] == [either.label_name(one) for one in result.class_labels[0].tolist()]
    assert_close(result.probabilities.sum(dim=1), torch.ones(9))


@pytest.mark.parametrize("model", [tiny_pipeline, tiny_dar])
def test_pruning_keeps_the_order_of_those_that_go_on_to_the_end(model):
    """With top_k >= 2 the answer is the exact one among the classes that were looked at to the end."""
    pipe = model(num_classes=12, names=False)
    whole = pipe.classify(IMAGES, top_k=12, prune_nats=None)
    exact, stages = whole.class_labels, int(whole.scores.stages.max())
    for margin in (0.0, 1.0, 4.0):
        found = pipe.classify(IMAGES, top_k=3, prune_nats=margin)
        for image in range(len(IMAGES)):
            survived = (found.scores.stages[image] == stages).nonzero().flatten()
            kept = [one for one in exact[image].tolist() if one in survived.tolist()]
            assert found.class_labels[image].tolist() == kept[:3]
        assert bool((found.probabilities.diff(dim=1) <= 0).all())


def test_an_image_is_classified_alone_as_in_a_batch(either):
    options = {"num_views": 3, "view_noise": 0.3, "seed": 4}
    together = either.classify(IMAGES, **options)
    alone = either.classify(IMAGES[8:], image_index=8, **options)
    assert_close(alone.scores.nats, together.scores.nats[8:], atol=1e-4, rtol=0)
    assert torch.equal(alone.class_labels, together.class_labels[8:])


def test_candidates_are_chosen_by_name_or_index(pipe):
    result = pipe.classify(IMAGES, ["hand", 0], 2)
    assert result.candidates == [2, 0] and set(result.class_labels.flatten().tolist()) <= {0, 2}
    one = pipe.classify(IMAGES[:2], "flag")
    assert one.names == [["flag"], ["flag"]] and one.probabilities.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("model", [tiny_text_pipeline, lambda: tiny_dar(num_classes=0, names=False, words=WORDS)])
def test_prompts_of_any_length_are_scored_as_alone(model):
    pipe = model()
    found = pipe.classify(IMAGES, prompts=PROMPTS, top_k=4, prune_nats=None)
    nats = torch.stack([pipe.log_prob(IMAGES, prompt=prompt) for prompt in PROMPTS], dim=1)
    assert_close(found.scores.nats, nats, atol=1e-4, rtol=0)
    assert_close(found.probabilities, nats.softmax(dim=1).sort(descending=True).values, atol=1e-4, rtol=0)
    assert found.names == [[PROMPTS[i] for i in row] for row in found.class_labels.tolist()]
    pruned = pipe.classify(IMAGES, prompts=PROMPTS, top_k=2, prune_nats=0.5).scores
    whole = pruned.stages == found.scores.stages
    assert 2 * len(IMAGES) <= int(whole.sum()) < whole.numel()
    assert_close(pruned.nats[whole], nats[whole], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no classes to choose from"):
        pipe.classify(IMAGES)
    with pytest.raises(UserError, match="named once"):
        pipe.classify(IMAGES, prompts=["a body", "a body"])


def test_tokens_of_a_sequence_add_up_to_their_evidence():
    pipe = tiny_dar(words=WORDS)
    asked = {"class_labels": ["flag", 0], "prompt": PROMPTS[::2]}
    evidence, ids = pipe.evidence(IMAGES[:2], **asked), pipe.encode(IMAGES[:2])
    ratio = pipe.log_prob(token_ids=ids, **asked) - pipe.log_prob(token_ids=ids)
    assert evidence.shape == (2, 16) and torch.equal(evidence, pipe.evidence(token_ids=ids, **asked))
    assert_close(evidence.sum(dim=1), ratio, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="evidence for a class"):
        pipe.evidence(IMAGES)


def test_evidence_is_a_map_of_nats(pipe):
    evidence = pipe.evidence(IMAGES, "flag")
    assert evidence.shape == (9, 4, 4)
    ratio = pipe.log_prob(IMAGES, "flag") - pipe.log_prob(IMAGES, None)
    assert_close(evidence.sum(dim=(1, 2)), ratio, atol=1e-3, rtol=0)


def test_heat_maps_are_red_above_zero_and_blue_below():
    picture = Image.new("RGB", (8, 8), (128, 128, 128))
    values = np.zeros((2, 2))
    assert np.array_equal(np.asarray(heat_map(picture, values)), np.asarray(picture))
    values[0, 0], values[1, 1] = 2.0, -2.0
    pixels = np.asarray(heat_map(picture, values)).astype(int)
    assert pixels[0, 0, 0] > 150 > pixels[0, 0, 2] and pixels[-1, -1, 2] > 150 > pixels[-1, -1, 0]
    assert np.array_equal(pixels[0, 0], np.asarray(heat_map(picture, np.full((1, 1), 9.0), limit=1.0))[0, 0])


def test_a_heat_map_lies_on_the_part_of_a_picture_that_was_read(pipe):
    """The central square of a wide picture that is upright by its EXIF tag: what lies beside it is grey."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 3), dtype=np.uint8)
    other = pixels.copy()
    other[:, :6], other[:, 14:] = 0, 255
    wide, beside = Image.fromarray(pixels), Image.fromarray(other)
    assert_close(pipe.evidence(wide, "flag"), pipe.evidence(beside, "flag"))
    read = wide.crop((6, 0, 14, 8))
    expected = np.asarray(heat_map(read, pipe.evidence(read, "flag")[0].numpy()))
    turned = wide.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # is to be turned back
    for shown in (wide, turned):
        made = np.asarray(heat_map(shown, pipe.evidence(shown, "flag")[0].numpy())).astype(int)
        assert made.shape == (8, 20, 3)
        coloured = (made[..., 0] != made[..., 1]) | (made[..., 1] != made[..., 2])
        assert not coloured[:, :6].any() and not coloured[:, 14:].any() and coloured[:, 6:14].mean() > 0.9
        assert np.array_equal(made[:, 6:14], expected)


def test_what_cannot_be_classified_is_refused(pipe):
    for arguments, said in [
        ({"class_labels": []}, "at least one class"),
        ({"class_labels": [None, 1]}, "got None"),
        ({"class_labels": [1, "flag"]}, "named once"),
        ({"class_labels": ["ship", 0]}, "no class 'ship'"),
        ({"top_k": 4}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"prune_nats": -1.0}, "prune_nats"),
        ({"prune_nats": float("nan")}, "prune_nats"),
        ({"num_views": 0}, "num_views"),
        ({"view_noise": 2.0, "num_views": 2}, "view_noise"),
        ({"view_noise": 0.1}, "more views"),
    ]:
        with pytest.raises(UserError, match=said):
            pipe.classify(IMAGES, **arguments)


def test_a_model_without_classes_is_refused():
    pipe = tiny_pipeline(num_classes=0, names=False)
    with pytest.raises(UserError, match="at least one class"):
        pipe.classify(IMAGES)
    with pytest.raises(UserError, match="no classes"):
        pipe.evidence(IMAGES, 0)
    with pytest.raises(UserError, match="evidence for a class"):
        pipe.evidence(IMAGES)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_classes_looked_at_to_the_end_come_first_and_keep_their_order(seed, keep):
    """The order among survivors is the exact one, and no dropped class is more probable than a survivor."""
    generator = torch.Generator().manual_seed(seed)
    gains, alive = torch.randn(4, 4, 6, generator=generator) * 3, torch.ones(4, 6, dtype=torch.bool)
    nats, below, stages = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.long)
    for gain in gains:
        nats, stages = nats + gain * alive, stages + alive
        below = torch.where(alive, nats.masked_fill(~alive, -torch.inf).amax(1, keepdim=True) - nats, below)
        if len(gains) > int(stages.max()):
            alive = surviving(nats, alive, keep=keep, margin_nats=2.0)
    scores = CandidateScores(nats, stages, below, torch.zeros(4, dtype=torch.long))
    for row in range(4):
        survived = alive[row].nonzero().flatten()
        exact_order = survived[nats[row, survived].argsort(descending=True)]
        assert torch.equal(scores.order[row, : len(survived)], exact_order)
        ranked = scores.probabilities[row, scores.order[row]]
        assert bool((ranked.diff() <= 0).all()) and abs(float(ranked.sum()) - 1) < 1e-5


def test_a_class_that_was_dropped_near_the_best_does_not_overtake():
    """Dropped at the first scale 1 nat below; the second survivor ends 5 nats below, and is still the second."""
    scores = CandidateScores(
        torch.tensor([[-1.0, -6.0, -2.0]]),
        torch.tensor([[3, 3, 1]]),
        torch.tensor([[0.0, 5.0, 1.0]]),
        torch.tensor([7]),
    )
    assert scores.order.tolist() == [[0, 1, 2]]
    assert_close(scores.probabilities, torch.tensor([[0.0, -5.0, -5.0]]).softmax(dim=1))


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
