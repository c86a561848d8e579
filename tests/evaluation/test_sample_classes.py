"""What decides about samples: another order of classes is another set, a larger N is more of the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation.classes import Balance, choose_classes, class_balanced_labels, own_frequency_labels
from isthmus.evaluation.images import ImageSet
from isthmus.evaluation.reference import DataSplits
from isthmus.samples import SampleRequest, draw, read
from tests.pipelines.tiny import tiny_pipeline

PIPELINE = tiny_pipeline()  # of face, flag and hand


def data(*names: str, counts: tuple[int, ...] = ()) -> DataSplits:
    """A data set of which only the classes are looked at."""
    labels = np.repeat(np.arange(len(names)), counts or (2,) * len(names)) if names else None
    images = ImageSet("data", "0", labels, names, 0 if labels is None else len(labels), lambda: iter(()))
    return DataSplits("folder:data", False, images, images, len(images), "")


def request(splits: DataSplits, num: int, balance: Balance = "uniform", pipeline=PIPELINE) -> SampleRequest:
    chosen = choose_classes(pipeline, splits, num, balance)
    return SampleRequest.of(pipeline, chosen.model_ids.tolist(), classes=chosen.rule, seed=0)


def test_a_larger_number_draws_more_of_the_same():
    splits = data("face", "flag", "hand", counts=(7, 2, 1))
    balances: tuple[Balance, ...] = ("uniform", "data")
    for balance in balances:
        few, many = (request(splits, num, balance) for num in (2, 200))
        assert few.settings == many.settings, "images are used again"
        assert few.labels == many.labels[:2]


def test_samples_with_other_labels_have_other_settings():
    """Whatever changes the class of a sample changes the settings of its folder."""
    asked: list[tuple[DataSplits, Balance]] = [
        (data("face", "flag"), "uniform"),
        (data("flag", "face"), "uniform"),
        (data("flag", "face", "hand"), "uniform"),
        (data("face", "flag", counts=(3, 1)), "data"),
        (data("face", "flag", counts=(1, 3)), "data"),
    ]
    found = [request(splits, 20, balance) for splits, balance in asked]
    for i, ours in enumerate(found):
        for theirs in found[:i]:
            assert ours.labels != theirs.labels and ours.settings != theirs.settings


def test_samples_name_the_classes_of_the_model_or_else_of_the_data(tmp_path):
    for name, pipeline in {"named": PIPELINE, "nameless": tiny_pipeline(num_classes=2, names=False)}.items():
        draw(pipeline, tmp_path / name, request(data("hand", "face"), 4, pipeline=pipeline))
        assert [row["label"] for row in read(tmp_path / name).rows] == ["hand", "face", "hand", "face"]


def test_frequencies_need_classes_on_both_sides():
    with pytest.raises(UserError, match="data is unlabelled"):
        choose_classes(PIPELINE, data(), 4, "data")
    with pytest.raises(UserError, match="the model is unlabelled"):
        choose_classes(tiny_pipeline(num_classes=0), data("face", "flag"), 4, "data")


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(sum), st.integers(1, 200))
def test_labels_keep_the_frequencies_at_every_length(counts, num):
    labels = own_frequency_labels(200, counts)[:num]
    assert np.array_equal(labels, own_frequency_labels(num, counts))
    shares = np.array(counts) / sum(counts)
    assert np.abs(np.bincount(labels, minlength=len(counts)) - shares * num).max() < len(counts)


@given(st.integers(1, 100), st.integers(0, 7))
def test_balanced_labels_differ_by_one_at_most(num, num_classes):
    counts = np.bincount(class_balanced_labels(num, num_classes), minlength=max(num_classes, 1))
    assert counts.max() - counts.min() <= 1 and counts.sum() == num
