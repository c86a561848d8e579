"""Images from anywhere: whatever holds them, the same images come out, in order, and nothing beside them."""

import json

import numpy as np
import pytest
from PIL import Image

from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import write_adm_images
from isthmus.evaluation.image_sets import joined, open_images, some
from isthmus.evaluation.samples import ChunkStore, SampleChunk

PICTURES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 0, 1, 0, 1])


def write_npz(folder):
    write_adm_images(folder / "a.npz", PICTURES, 6, LABELS)
    return folder / "a.npz"


def write_chunks(folder):
    for chunk, start in enumerate((0, 4)):
        rows = slice(start, start + 4)
        nothing = np.empty((len(PICTURES[rows]), 0), np.int64)
        ChunkStore(folder / "samples", {}).write(chunk, SampleChunk(PICTURES[rows], LABELS[rows], nothing, {}))
    return folder


def write_samples(folder):
    rows = []
    for index, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        Image.fromarray(picture).save(folder / f"{index}.png")
        rows.append({"file": f"{index}.png", "class_id": int(label), "label": ["face", "flag"][label]})
    (folder / "samples.json").write_text(json.dumps({"images": rows}))
    Image.fromarray(PICTURES[0]).save(folder / "grid.png")
    return folder


def write_files(folder):
    for index, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        (folder / ["face", "flag"][label]).mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / ["face", "flag"][label] / f"{index}.png")
    return folder


@pytest.mark.parametrize("write", [write_npz, write_chunks, write_samples, write_files])
def test_the_same_images_come_out(tmp_path, write):
    images = open_images(write(tmp_path))
    found, labels = np.stack(list(images)), images.labels
    assert labels is not None and len(images) == 6 and images.size() == (8, 8)
    order = [next(i for i in range(6) if np.array_equal(PICTURES[i], one)) for one in found]
    assert sorted(order) == list(range(6)) and np.array_equal(LABELS[order], labels)
    assert np.array_equal(np.stack(list(images)), found), "a second reading starts again"
    assert open_images(write(tmp_path)).fingerprint == images.fingerprint


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
        list(open_images(tmp_path).shown("images"))
    assert {image.shape for image in open_images(tmp_path, image_size=4)} == {(4, 4, 3)}
    with pytest.raises(UserError, match="neither"):
        open_images(tmp_path / "nowhere")
