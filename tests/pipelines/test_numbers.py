"""Seeds, numbers of images and classes are whole numbers of any make; a class is a number or a name, never both."""

import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.pipelines.labels import label_list, labels_from_words, resolve_labels
from isthmus.pipelines.request import image_seeds, spread
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

NAMES = {"0": "tench, Tinca tinca", "1": "2", "2": "null", "3": "face"}


def test_whole_numbers_of_any_make():
    for make in (int, np.int64, np.uint8, np.array, torch.tensor, lambda one: torch.tensor(one, dtype=torch.int32)):
        assert image_seeds(2, seed=make(7), image_index=make(3)) == [(7, 3), (7, 4)]
        assert image_seeds(2, seed=[make(7), 8]) == [(7, 0), (8, 0)]
        assert image_seeds(2, seed=7, image_index=[make(4), make(1)]) == [(7, 4), (7, 1)]
        assert resolve_labels([make(2), None], class_names={}, num_classes=3) == [2, 3]
        assert resolve_labels(make(2), class_names={}, num_classes=3) == [2]
        assert spread([1], make(2), make(1)) == [1, 1]
        for number in (one for pair in image_seeds(2, seed=make(7)) for one in pair):
            assert type(number) is int  # they go into JSON
    for several in (list, np.array, torch.tensor, tuple):
        assert image_seeds(2, seed=several([7, 8])) == [(7, 0), (8, 0)]
        assert image_seeds(2, seed=7, image_index=several([4, 1])) == [(7, 4), (7, 1)]
        assert label_list(several([2, 0])) == [2, 0]


@pytest.mark.parametrize("made", [tiny_pipeline, tiny_dar])
def test_the_same_images_whatever_the_make(made):
    pipe = made()
    wanted = pipe([1, "hand"], seed=5, output_type="np").images
    for labels in ([np.int64(1), np.str_("hand")], np.array([1, 2]), torch.tensor([1, 2])):
        found = pipe(labels, np.int64(2), seed=torch.tensor(5), image_index=np.int32(0), output_type="np")
        assert np.array_equal(found.images, wanted) and found.class_labels == [1, 2]
    assert pipe(np.array(["flag", "hand"]), seed=5).class_labels == [1, 2]


def test_what_is_no_whole_number_is_refused():
    names = {"0": "a", "1": "b"}
    for bad in (0.7, 1.0, True, np.float32(1), np.bool_(True), torch.tensor(1.0), torch.tensor(True), b"1"):
        for refused in (
            lambda bad=bad: image_seeds(1, seed=bad),
            lambda bad=bad: image_seeds(1, seed=[bad]),
            lambda bad=bad: image_seeds(1, seed=1, image_index=bad),
            lambda bad=bad: resolve_labels([bad], class_names=names, num_classes=2),
            lambda bad=bad: resolve_labels(bad, class_names=names, num_classes=2),
        ):
            with pytest.raises(UserError, match="must be a whole number, got"):
                refused()
    with pytest.raises(UserError, match="must be a whole number"):
        image_seeds(1, seed="7")
    with pytest.raises(UserError, match="must be a whole number"):
        resolve_labels([[1]], class_names={}, num_classes=2)


def test_a_word_is_a_name_where_a_class_has_it_and_else_a_number():
    for word, number in [
        ("face", 3), ("3", 3), ("2", 1), ("id:2", 2), ("name:2", 1), ("null", 2), ("id:null", 4), ("none", 4),
        ("tench, Tinca tinca", 0), ("name:tench, Tinca tinca", 0), ("id:0", 0),
    ]:  # fmt: skip
        assert resolve_labels(labels_from_words([word], NAMES), class_names=NAMES, num_classes=4) == [number], word
    for word, said in [
        ("tench", "Did you mean 'tench, Tinca tinca'"),
        ("id:face", "id: is followed by the number"),
        ("name:7", "no class '7'"),
        ("7", r"0\.\.3"),
        ("id:-1", r"0\.\.3"),
    ]:
        with pytest.raises(UserError, match=said):
            resolve_labels(labels_from_words([word], NAMES), class_names=NAMES, num_classes=4)


def test_in_python_numbers_are_numbers_and_texts_are_names(caplog):
    assert resolve_labels([2, "2"], class_names=NAMES, num_classes=4) == [2, 1]
    caplog.set_level("INFO", logger="isthmus")
    labels_from_words(["2"], NAMES)
    assert "numbered 2 is id:2" in caplog.text
