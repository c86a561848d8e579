"""Class ids are numbers: 10 comes after 9, and not after 1 as text does."""

import json

import numpy as np
import pytest

from isthmus.cli.info import describe_model
from isthmus.errors import UserError
from isthmus.evaluation.classes import choose_classes
from isthmus.evaluation.reference import open_splits
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.saved_networks import kept_classes, load_model
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

FAMILIES = pytest.mark.parametrize("made", [tiny_pipeline, tiny_dar])
COUNT = 112  # of one, two and three digits


def names_of() -> list[str]:
    """Names whose alphabetic order is not that of their numbers."""
    return [f"class {COUNT - index}" for index in range(COUNT)]


def model_of(made):
    pipe = made(num_classes=COUNT, names=False)
    return type(pipe)(**pipe.components, class_names=names_of())


@FAMILIES
def test_classes_keep_their_numbers(made, tmp_path):
    pipe, names = model_of(made), names_of()
    pipe.save_pretrained(tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model_index.json").read_text())
    assert list(index["class_names"].values()) == names
    # as earlier versions wrote it: numbers sorted as text
    pipe.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index, sort_keys=True))
    for folder in (tmp_path / "new", tmp_path / "old"):
        loaded = load_pipeline(folder)
        assert list(loaded.class_names.values()) == names
        assert loaded.fingerprint == pipe.fingerprint
        assert [loaded.label_name(i) for i in range(COUNT)] == names
        shown = ", ".join(names[:12])
        assert shown in describe_model(folder) and shown in loaded.card()
        loaded.save_pretrained(tmp_path / f"{folder.name} again")
        assert load_pipeline(tmp_path / f"{folder.name} again").class_names == pipe.class_names
        # what a run that starts from it knows, and which of the classes of other data it keeps
        kept_names = names_in_order(load_model(str(folder), type(pipe)).class_names)
        assert kept_names == tuple(names)
        assert kept_classes([names[10], "other", names[2]], kept_names) == {0: 10, 2: 2}


@FAMILIES
def test_samples_and_images_of_a_class_meet(made, tmp_path):
    """The data list their classes by the alphabet, the model by its numbers; evaluation goes by the model's."""
    names = names_of()
    model_of(made).save_pretrained(tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    images = np.zeros((2 * COUNT, 8, 8, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(2 * COUNT) % 256, np.arange(2 * COUNT) // 256
    np.savez(tmp_path / "images.npz", images, np.array(names * 2))
    splits = open_splits(
        f"npz:{tmp_path / 'images.npz'}", image_size=8, classes=(), wanted=names_in_order(pipe.class_names)
    )
    chosen = choose_classes(pipe, splits, 2 * COUNT, "uniform")
    assert splits.class_names == chosen.model_names == tuple(names)
    assert [names[i] for i in chosen.model_ids] == [chosen.names[i] for i in chosen.labels]


def test_numbers_that_are_not_those_of_the_classes_are_refused():
    pipe = tiny_pipeline()
    for indices in ("02", "13", ("0", "x", "2")):
        with pytest.raises(UserError, match=r"numbers 0\.\.|one name per class"):
            type(pipe)(**pipe.components, class_names=dict.fromkeys(indices, "a"))
