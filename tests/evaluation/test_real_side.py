"""Real images measured once for many models, and what a search for copies among them finds."""

import numpy as np
import pytest

from isthmus.data.opening import open_source
from isthmus.evaluation import reference as real_side
from isthmus.evaluation.features import extract_features, feature_network
from isthmus.evaluation.record import Score
from isthmus.evaluation.reference import (
    choose_reference,
    measure_real_side,
    open_splits,
    training_views,
    view_words,
)
from isthmus.evaluation.scores import RealImages, RealSides, score_samples
from tests.evaluation.tiny_evaluation import mean_colour
from tests.training.tiny_runs import write_images

SIDE, CLASSES, VIEWS = 32, ("rocket", "coffee"), 100


@pytest.fixture(scope="module")
def photos():
    """Two photographs measured on real features, and a function that scores views of a split drawn with other seeds."""
    network = feature_network("lite0")
    data = open_splits("photos", image_size=SIDE, classes=CLASSES, wanted=())
    reference = choose_reference(data, None, size=(SIDE, SIDE))
    real = measure_real_side(reference, data, network, VIEWS)

    def scored(split: str) -> dict[str, Score]:
        source = open_source("photos", image_size=SIDE, split=split, classes=CLASSES)
        rows = extract_features(network, training_views(source, SIDE, VIEWS, seed=1))
        return {one.name: one for one in score_samples(rows, None, reference, real, network, ()).scores}

    return scored


@pytest.mark.slow
def test_copies_of_training_are_found_as_the_ceiling_says_and_new_images_as_the_floor(photos):
    """Positive and negative control: fresh crops of training photographs, and of the strips that were held out."""
    copied, new = photos("train"), photos("val")
    share, nearer = "memorised share", "nearer than held-out"
    ceiling = copied[share].ceiling
    assert ceiling is not None and ceiling > 0.9 and "512 of 512" in copied[share].note
    assert copied[share].value == pytest.approx(ceiling, abs=0.08) and new[share].value < 0.06
    for found, end in ((copied, copied[nearer].ceiling), (new, new[nearer].floor)):
        assert found[nearer].value == pytest.approx(end, abs=0.1)


def test_views_are_those_of_training_and_their_own(tmp_path):
    source = open_source(write_images(tmp_path / "a.npz", count=40, side=16), image_size=8)
    views = training_views(source, 8, 60)
    assert len(views) == len(list(views)) == 60 and views.size() == (8, 8)
    again = training_views(source, 8, 60, seed=1)
    assert any(not np.array_equal(one, other) for one, other in zip(views, again, strict=True))
    assert all(np.array_equal(one, other) for one, other in zip(views, views, strict=True))
    assert view_words(source) == "training images as training sees them, cropped and mirrored"


def test_thinned_training_images_are_said_and_do_not_change_the_frequencies(tmp_path, monkeypatch):
    monkeypatch.setattr(real_side, "TRAINING_LIMIT", 10)
    spec = write_images(tmp_path / "a.npz", count=200, num_classes=2)
    data = open_splits(spec, image_size=8, classes=(), wanted=())
    assert len(data.train) == 10 and data.num_train + len(data.held_out) == 200
    assert data.class_counts().tolist() == [100, 100]
    real = measure_real_side(choose_reference(data, None, size=(8, 8)), data, mean_colour(), 4)
    assert f"searched 10 of {data.num_train} training images" in real.searched and "not seen" in real.searched


def test_what_is_used_again_is_what_would_be_measured(tmp_path):
    network, sides = mean_colour(), RealSides()
    specs = [write_images(tmp_path / f"{seed}.npz", count=200, num_classes=2, seed=seed) for seed in (0, 1)]
    splits = [open_splits(spec, image_size=8, classes=(), wanted=()) for spec in specs]
    references = [choose_reference(one, None, size=(8, 8)) for one in splits]

    def measured(which: int, n: int):
        return RealImages(network, splits[which], references[which], (8, 8), sides).measured(n)

    first = measured(0, 2)
    assert measured(0, 2) is first
    for which, n in ((0, 3), (1, 2)):
        other = measured(which, n)
        assert other is not first
        direct = measure_real_side(references[which], splits[which], network, n)
        assert other.reference is not None and direct.reference is not None
        assert np.array_equal(other.reference.reference["colour"], direct.reference.reference["colour"])
        assert np.array_equal(other.reference.ruined["colour"], direct.reference.ruined["colour"])
    # another order of the classes is another numbering of the labels
    turned = open_splits(specs[0], image_size=8, classes=tuple(reversed(splits[0].class_names)), wanted=())
    assert RealImages(network, turned, references[0], (8, 8), sides).measured(2) is not first


def test_drawings_without_end_are_measured_against_fresh_ones():
    """As many on each side as samples; nobody trained on them, and they are not the held-out part either."""
    data = open_splits(
        "avatars:gaze,stack", image_size=8, classes=("stack", "gaze"), wanted=(), max_images=40, num_samples=30
    )
    against = choose_reference(data, None, size=(8, 8))
    assert data.fresh is not None and against.images is data.fresh and not against.holds_training
    assert (len(data.fresh), against.images_per_measurement(30), data.fresh.class_names) == (60, 30, ("stack", "gaze"))
    parts = [{image.tobytes() for image in part} for part in (data.fresh, data.train, data.held_out)]
    assert len(parts[0] - parts[1] - parts[2]) > 30
    few = open_splits("avatars:gaze,stack", image_size=8, classes=(), wanted=(), max_images=40)
    assert few.fresh is None and "training and" in choose_reference(few, None, size=(8, 8)).words
