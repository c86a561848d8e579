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
        options = f"--classes flag,null --num 3 --seed 5 --batch-size {size}".split()
        words = (*options, "--out", tmp_path / f"o{size}")
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


def test_every_edit_writes_its_pictures(isthmus, model, image, mask, tmp_path):
    for number, words in enumerate(
        (
            "class --classes hand --jumps 1",
            "class --classes hand --jumps 0,1,2 --jump-scales 1 --max-unknown 0.5,0.25,0",
            "inpaint --published --no-paste",
            "outpaint --right 8 --top 2",
            "variations --from-scale 1 --classes face",
            "super-resolve --max-unknown 0.2",
        )
    ):
        kind, *options = words.split()
        out, source = tmp_path / str(number), image
        masked = ("--mask", mask) if kind in ("class", "inpaint") else ()
        if kind == "super-resolve":
            source = tmp_path / "small.png"
            Image.open(image).resize((4, 4)).save(source)
        result = isthmus("edit", kind, model, "--image", source, *masked, "--num", 2, "--out", out, *options)
        assert result.code == 0, result
        assert names(out) == ["000000.png", "000001.png", "overview.png", "samples.json"]
        with Image.open(out / "000000.png") as picture:
            assert max(picture.size) == 8


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


def test_bad_input_is_one_line_and_writes_nothing(refused, model, image, mask, tmp_path):
    pictures = {"IMAGE": image, "MASK": mask, "EMPTY": tmp_path / "empty.png", "SMALL": tmp_path / "small.png"}
    Image.new("L", (8, 8), 127).save(pictures["EMPTY"])
    Image.new("L", (4, 4), 255).save(pictures["SMALL"])
    for words, said in [
        ("inpaint MODEL --image IMAGE --mask EMPTY", "empty"),
        ("inpaint MODEL --image IMAGE --mask SMALL", "full"),
        ("inpaint MODEL --image IMAGE --mask none.png", "--mask"),
        ("inpaint MODEL --image none.png --mask MASK", "--image"),
        ("inpaint MODEL --image IMAGE --mask MASK --num 0", "--num"),
        ("inpaint MODEL --image IMAGE --mask MASK --jumps 0,1", "one per scale"),
        ("inpaint MODEL --image IMAGE --mask MASK --published --max-unknown 0.2", "own rule"),
        ("class MODEL --image IMAGE --mask MASK", "--classes"),
        ("super-resolve MODEL --image IMAGE", "smaller"),
        ("erase", "edit needs one of"),
    ]:
        given = [str(pictures.get(word, word)).replace("MODEL", str(model)) for word in words.split()]
        out = ("--out", tmp_path / "o") if "MODEL" in words else ()
        assert said in refused("edit", *given, *out)
    assert not (tmp_path / "o").exists()
    words = ("--image", image, "--left", 1, "--out", tmp_path)
    assert "new, empty or a folder of samples" in refused("edit", "outpaint", model, *words)
