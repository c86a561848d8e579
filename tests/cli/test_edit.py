"""`isthmus edit`: every command writes its pictures, and bad input writes nothing."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from isthmus.pipelines.loading import load_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def mask(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[2:6, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_inpainting_does_not_depend_on_the_batch_size(isthmus, model, image, mask, tmp_path):
    for size in (1, 4):
        words = (
            "--classes",
            "flag,null",
            "--num",
            3,
            "--seed",
            5,
            "--batch-size",
            size,
            "--out",
            tmp_path / f"o{size}",
        )
        result = isthmus("edit", "inpaint", model, "--image", image, "--mask", mask, *words)
        assert result.code == 0 and "3 edits" in result.err, result
    assert names(tmp_path / "o1") == ["000000.png", "000001.png", "000002.png", "overview.png", "samples.json"]
    texts = []
    for folder in ("o1", "o4"):
        with Image.open(tmp_path / folder / "000002.png") as picture:
            texts.append(dict(picture.info))
            assert picture.size == (8, 8)
    assert (
        texts[0] == texts[1] and texts[0]["label"] == "flag" and texts[0]["model"] == load_pipeline(model).fingerprint
    )
    settings = json.loads(texts[0]["settings"])
    assert settings["mask_sha256"] == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert (settings["edit"], settings["dtype"]) == ("inpaint", "float32")


def test_running_again_makes_what_is_missing_of_the_same_edit(isthmus, refused, model, image, mask, tmp_path):
    words = ("edit", "inpaint", model, "--image", image, "--mask", mask, "--num", 3, "--out", tmp_path / "o")
    assert isthmus(*words).code == 0
    with Image.open(tmp_path / "o" / "000001.png") as picture:
        before = np.asarray(picture)
    (tmp_path / "o" / "000001.png").unlink()
    again = isthmus(*words, "--batch-size", 1)
    assert "3 edits" in again.err and "in 1 batch)" in again.err
    with Image.open(tmp_path / "o" / "000001.png") as picture:
        assert np.array_equal(np.asarray(picture), before)
    assert "jumps differ" in refused("-q", *words, "--jumps", 1)
    Image.new("L", (8, 8), 255).save(mask)
    assert "mask_sha256 differ" in refused("-q", *words)


@pytest.mark.parametrize(
    "words",
    [
        ("class", "--classes", "hand", "--jumps", 1),
        ("class", "--classes", "hand", "--jumps", "0,1,2", "--jump-scales", 1, "--max-unknown", "0.5,0.25,0"),
        ("inpaint", "--published", "--no-paste"),
        ("outpaint", "--right", 8, "--top", 2),
        ("variations", "--from-scale", 1, "--classes", "face"),
    ],
)
def test_every_edit_writes_its_pictures(words, isthmus, model, image, mask, tmp_path):
    masked = ("--mask", mask) if words[0] in ("class", "inpaint") else ()
    result = isthmus(
        "edit", words[0], model, "--image", image, *masked, "--num", 2, "--out", tmp_path / "o", *words[1:]
    )
    assert result.code == 0, result
    assert names(tmp_path / "o") == ["000000.png", "000001.png", "overview.png", "samples.json"]


def test_one_number_serves_all_scales_and_forwards_are_said(isthmus, model, image, mask, tmp_path):
    settings, said = [], []
    for name, words in {"one": ("--jumps", 2), "each": ("--jumps", "0,0,2")}.items():
        # with less than a quarter of a token unknown, every scale has tokens to draw
        out = ("--num", 2, "--batch-size", 1, "--max-unknown", 0.2, "--out", tmp_path / name)
        said.append(isthmus("edit", "inpaint", model, "--image", image, "--mask", mask, *out, *words).err)
        with Image.open(tmp_path / name / "000001.png") as picture:
            settings.append(json.loads(picture.info["settings"])["jumps"])
            pixels = np.asarray(picture)
    assert settings == [2, [0, 0, 2]]
    with Image.open(tmp_path / "one" / "000001.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)
    # three scales and twice two again, for each of two batches
    assert all("14 forwards in 2 batches" in line for line in said)


def test_the_overview_stretches_nothing(isthmus, model, tmp_path):
    """A wide black picture beside square variations: black in its middle, white above and below."""
    Image.new("RGB", (16, 4)).save(tmp_path / "wide.png")
    words = ("--image", tmp_path / "wide.png", "--from-scale", 1, "--num", 1, "--out", tmp_path / "o")
    assert isthmus("edit", "variations", model, *words).code == 0
    with Image.open(tmp_path / "o" / "overview.png") as overview:
        cell = np.asarray(overview.convert("L"))[-66:-2, :64]  # the 8 pixels of the model, eight times as large
    assert cell[30:34].max() < 50 and cell[:12].min() > 200 and cell[-12:].min() > 200


def test_super_resolution_of_a_small_file(isthmus, model, image, tmp_path):
    with Image.open(image) as picture:
        picture.resize((4, 4)).save(tmp_path / "small.png")
    words = ("--image", tmp_path / "small.png", "--num", 1, "--out", tmp_path / "o", "--max-unknown", "0.2")
    assert isthmus("edit", "super-resolve", model, *words).code == 0
    with Image.open(tmp_path / "o" / "000000.png") as picture:
        assert picture.size == (8, 8)


def test_bad_input_is_one_line_and_writes_nothing(refused, model, image, mask, tmp_path):
    out = tmp_path / "o"
    Image.new("L", (8, 8)).save(tmp_path / "empty.png")
    Image.new("L", (4, 4), 255).save(tmp_path / "small.png")
    base = ("edit", "inpaint", model, "--image", image, "--out", out)
    assert "empty" in refused(*base, "--mask", tmp_path / "empty.png")
    assert "full" in refused(*base, "--mask", tmp_path / "small.png")
    Image.new("L", (8, 8), 127).save(tmp_path / "grey.png")
    assert "empty" in refused(*base, "--mask", tmp_path / "grey.png")
    assert "--mask" in refused(*base, "--mask", tmp_path / "none.png")
    assert "max_unknown" in refused(*base, "--mask", mask, "--max-unknown", 1.5)
    assert "one per scale" in refused(*base, "--mask", mask, "--max-unknown", "0.5,0.5")
    assert "jumps" in refused(*base, "--mask", mask, "--jumps", -1)
    assert "one per scale" in refused(*base, "--mask", mask, "--jumps", "0,1")
    assert "without jumps" in refused(*base, "--mask", mask, "--jump-scales", 1)
    assert "paste=False" in refused(*base, "--mask", mask, "--no-paste", "--seam-px", 1)
    assert "own rule" in refused(*base, "--mask", mask, "--published", "--max-unknown", 0.2)
    assert "no class" in refused(*base, "--mask", mask, "--classes", "ship")
    assert "--classes" in refused("edit", "class", model, "--image", image, "--mask", mask, "--out", out)
    assert "margins" in refused("edit", "outpaint", model, "--image", image, "--out", out)
    assert "smaller" in refused("edit", "super-resolve", model, "--image", image, "--out", out)
    assert "from_scale" in refused("edit", "variations", model, "--image", image, "--from-scale", 9, "--out", out)
    assert "edit needs one of" in refused("edit", "erase")
    assert not out.exists()
    assert "new, empty or a folder of samples" in refused(
        "edit", "outpaint", model, "--image", image, "--left", 1, "--out", tmp_path
    )
