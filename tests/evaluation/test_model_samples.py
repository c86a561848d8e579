"""What decides about samples: another order of classes is another set, a larger N is more of the same."""

import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.evaluation.drawing import Balance, choose_classes, model_samples
from isthmus.evaluation.features import FeatureNetwork
from isthmus.evaluation.images import ImageSet
from isthmus.evaluation.reference import DataSplits
from tests.pipelines.tiny import tiny_pipeline

PIPELINE = tiny_pipeline()  # of face, flag and hand


def data(*names: str, counts: tuple[int, ...] = ()) -> DataSplits:
    """A data set of which only the classes are looked at."""
    labels = np.repeat(np.arange(len(names)), counts or (2,) * len(names)) if names else None
    images = ImageSet("data", "0", labels, names, 0 if labels is None else len(labels), lambda: iter(()))
    return DataSplits("folder:data", False, images, images, len(images), "")


def settings(folder, splits: DataSplits, num: int, balance: Balance = "uniform", pipeline=PIPELINE):
    network = FeatureNetwork(
        lambda images: {}, name="net", spaces={"net-1": 1}, preprocessing="", weights_sha256="",
        device=torch.device("cpu"),
    )  # fmt: skip
    chosen = choose_classes(pipeline, splits, num, balance)
    made = model_samples(pipeline, chosen, folder, network, seed=0, options={}, steering={}, dtype="float32")
    return chosen, made.store.settings


@pytest.mark.parametrize("balance", ["uniform", "data"])
def test_a_larger_number_draws_more_of_the_same(tmp_path, balance):
    splits = data("face", "flag", "hand", counts=(7, 2, 1))
    few, many = (settings(tmp_path, splits, num, balance) for num in (2, 200))
    assert few[1] == many[1], "chunks are used again"
    assert np.array_equal(few[0].model_ids, many[0].model_ids[:2])


def test_samples_with_other_labels_have_other_settings(tmp_path):
    """Whatever changes the class of a sample changes the settings of its chunk."""
    asked: list[tuple[DataSplits, Balance]] = [
        (data("face", "flag"), "uniform"),
        (data("flag", "face"), "uniform"),
        (data("flag", "face", "hand"), "uniform"),
        (data("face", "flag", counts=(3, 1)), "data"),
        (data("face", "flag", counts=(1, 3)), "data"),
    ]
    found = [settings(tmp_path, splits, 20, balance) for splits, balance in asked]
    for i, (ours, here) in enumerate(found):
        for theirs, there in found[:i]:
            assert not np.array_equal(ours.model_ids, theirs.model_ids) and here != there


def test_chunks_name_the_classes_of_the_model(tmp_path):
    chosen, found = settings(tmp_path, data("hand", "face"), 4)
    assert [found["class_names"][label] for label in chosen.model_ids] == ["hand", "face", "hand", "face"]


def test_frequencies_need_classes_on_both_sides():
    with pytest.raises(UserError, match="data is unlabelled"):
        choose_classes(PIPELINE, data(), 4, "data")
    with pytest.raises(UserError, match="the model is unlabelled"):
        choose_classes(tiny_pipeline(num_classes=0), data("face", "flag"), 4, "data")
