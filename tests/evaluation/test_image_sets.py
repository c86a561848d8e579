"""Images from anywhere: whatever holds them, the same images come out, in order, and nothing beside them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import write_adm_images
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.images import joined, open_images, some
from isthmus.evaluation.record import RECORD
from isthmus.evaluation.reference import choose_reference
from tests.evaluation.tiny_evaluation import mean_colour

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 0, 1, 0, 1])


def write_npz(folder):
    write_adm_images(folder / "a.npz", PICTURES, 6, LABELS, ("face", "flag"))
    return folder / "a.npz"


def write_samples(folder):
    rows = []
    for index, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        Image.fromarray(picture).save(folder / f"{index}.png")
        rows.append({"file": f"{index}.png", "index": index, "class_id": int(label), "label": ["face", "flag"][label]})
    (folder / "samples.json").write_text(json.dumps({"images": rows}))
    Image.fromarray(PICTURES[0]).save(folder / "grid.png")
    return folder


def write_evaluation(folder):
    (folder / "samples").mkdir(exist_ok=True)
    write_samples(folder / "samples")
    return folder


def write_files(folder):
    for index, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        (folder / ["face", "flag"][label]).mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / ["face", "flag"][label] / f"{index}.png")
    return folder


def test_the_same_images_come_out(tmp_path):
    for write in (write_npz, write_evaluation, write_samples, write_files):
        folder = tmp_path / write.__name__
        folder.mkdir()
        images = open_images(write(folder))
        found, labels = np.stack(list(images)), images.labels
        assert labels is not None and len(images) == 6 and images.size() == (8, 8)
        assert images.class_names == ("face", "flag")
        order = [next(i for i in range(6) if np.array_equal(PICTURES[i], one)) for one in found]
        assert sorted(order) == list(range(6)) and np.array_equal(LABELS[order], labels)
        assert np.array_equal(np.stack(list(images)), found), "a second reading starts again"
        assert open_images(write(folder)).fingerprint == images.fingerprint


def test_some_and_joined(tmp_path):
    images = open_images(write_files(tmp_path))
    few = some(images, 3)
    assert len(few) == len(list(few)) == 3 and few.at is not None
    assert any(np.array_equal(few.at(2), picture) for picture in PICTURES)
    assert some(images, 6) is images and few.fingerprint != images.fingerprint
    both = joined((images, few), "both")
    assert len(both) == len(list(both)) == 9 and both.labels is not None and len(both.labels) == 9


def test_images_of_two_sizes_are_refused_or_brought_to_one(tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(PICTURES[1], 2, axis=1)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="one size"):
        extract_features(mean_colour(), open_images(tmp_path).shown("images"))
    assert {image.shape for image in open_images(tmp_path, size=(4, 4))} == {(4, 4, 3)}
    with pytest.raises(UserError, match="neither"):
        open_images(tmp_path / "nowhere")


def test_a_missing_or_left_over_sample_is_none(tmp_path):
    folder = write_evaluation(tmp_path)
    manifest = folder / "samples" / "samples.json"
    # the record says five: the sixth was drawn for a larger evaluation
    (folder / RECORD).write_text(json.dumps({"format": 1, "protocol": {"num_samples": 5}}))
    assert len(open_images(folder)) == len(list(open_images(folder))) == 5
    rows = json.loads(manifest.read_text())["images"]

    def refused(kept, said):
        manifest.write_text(json.dumps({"images": kept}))
        with pytest.raises(UserError, match=said):
            open_images(folder)

    refused(rows[:4], "of samples 0 to 4, samples.json lacks 4")
    (folder / RECORD).unlink()
    refused(rows[:2] + rows[3:], "samples.json lacks 2")
    refused([], "no finished samples")
    refused([*rows[:2], {name: value for name, value in rows[2].items() if name != "class_id"}], "has no class_id")
    manifest.unlink()
    (folder / "samples" / "chunk_00000.npz").write_bytes(b"")
    with pytest.raises(UserError, match="an earlier version"):
        open_images(folder)


def test_names_not_numbers_say_the_class_of_samples(tmp_path):
    """Only classes 3 and 7 of a model were drawn: their names stay with their images."""
    write_samples(tmp_path)
    rows = json.loads((tmp_path / "samples.json").read_text())["images"]
    for row in rows:
        row["class_id"] = {"face": 7, "flag": 3}[row["label"]]
    (tmp_path / "samples.json").write_text(json.dumps({"images": rows}))
    images = open_images(tmp_path)
    assert images.labels is not None
    assert [images.class_names[label] for label in images.labels] == [row["label"] for row in rows]
    # a model without names writes numbers, which are no names
    for row in rows:
        row["label"] = str(row["class_id"])
    (tmp_path / "samples.json").write_text(json.dumps({"images": rows}))
    assert open_images(tmp_path).labels is None


def test_both_splits_of_a_folder_are_read(tmp_path):
    for held_out in ("val", "test"):
        for part, picture in (("train", 0), (held_out, 1)):
            place = tmp_path / f"with-{held_out}" / part / "face"
            place.mkdir(parents=True)
            Image.fromarray(PICTURES[picture]).save(place / "a.png")
        images = open_images(tmp_path / f"with-{held_out}")
        assert np.array_equal(np.stack(list(images)), PICTURES[:2]) and images.class_names == ("face",)


def test_a_folder_is_resized_to_square_samples_alone_and_says_so(tmp_path):
    wide = np.concatenate([PICTURES[0], PICTURES[1]], axis=1)
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert open_images(tmp_path, size=(8, 16)).size() == (8, 16), "samples of the same size need no crop"
    assert open_images(tmp_path, size=(8, 16)).resized == ""
    square = open_images(tmp_path, size=(8, 8))
    assert square.size() == (8, 8) and "shorter side to 8 px" in square.resized
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    as_it_lies = open_images(tmp_path, size=(8, 8))
    assert as_it_lies.resized == "" and np.array_equal(next(iter(as_it_lies)), PICTURES[0])


def test_a_place_may_have_its_kind_in_front(tmp_path):
    write_npz(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    for kind, name in ("npz", "a.npz"), ("folder", "pictures"):
        plain, named = open_images(tmp_path / name), open_images(Path(f"{kind}:{tmp_path / name}"))
        assert (plain.fingerprint, plain.name, len(plain)) == (named.fingerprint, named.name, 6)
        assert choose_reference(None, Path(f"{kind}:{tmp_path / name}"), size=(8, 8)).fingerprint == plain.fingerprint
    for other in ("openmoji", "hf:owner/name"):
        with pytest.raises(UserError, match="named with --data"):
            open_images(Path(other))
