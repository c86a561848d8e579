"""Classification as a pipeline offers it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from isthmus.errors import UserError
from isthmus.pictures import heat_map
from tests.pipelines.tiny import tiny_pipeline

IMAGES = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_the_argmax_of_log_prob(either):
    result = either.classify(IMAGES, top_k=3, prune_nats=None)
    nats = torch.stack([either.log_prob(IMAGES, label) for label in range(3)], dim=1)
    assert torch.equal(result.class_labels, nats.argsort(dim=1, descending=True))
    assert_close(result.scores.nats, nats, atol=1e-4, rtol=0)
    assert result.names[0] == [either.label_name(one) for one in result.class_labels[0].tolist()]
    assert_close(result.probabilities.sum(dim=1), torch.ones(9))


def test_pruning_keeps_the_order_of_those_that_go_on_to_the_end():
    """With top_k >= 2 the answer is the exact one among the classes that were looked at to the end."""
    pipe = tiny_pipeline(num_classes=12, names=False)
    exact = pipe.classify(IMAGES, top_k=12, prune_nats=None).class_labels
    for margin in (0.0, 1.0, 4.0):
        found = pipe.classify(IMAGES, top_k=3, prune_nats=margin)
        for image in range(len(IMAGES)):
            survived = (found.scores.scales[image] == 3).nonzero().flatten()
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
