"""`isthmus sample` with models of the D-AR family."""

import json

import numpy as np
import pytest
from PIL import Image

from isthmus.pipelines.loading import load_pipeline
from tests.pipelines.tiny_dar import WORDS, tiny_dar
from tests.testers import token_hashes


@pytest.fixture
def layout_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "layout.png")
    return tmp_path / "layout.png"


def manifest(folder):
    return json.loads((folder / "samples.json").read_text())


def hashes(folder):
    return [row["token_ids_sha256"] for row in manifest(folder)["images"]]


def test_grid_and_strip_of_solver_steps(isthmus, dar_model, tmp_path):
    words = ("--grid", "--strip", "--steps", 6, "--solver", "euler")
    assert isthmus("sample", dar_model, "--num", 3, "--out", tmp_path / "o", *words).code == 0
    with Image.open(tmp_path / "o" / "strip.png") as strip:
        assert strip.width > 6 * 66 and strip.height > 3 * 66
    assert (tmp_path / "o" / "grid.png").is_file()


def test_8_bit_weights_are_part_of_the_settings(isthmus, refused, dar_model, tmp_path):
    words = ("--num", 2, "--seed", 5)
    assert isthmus("sample", dar_model, *words, "--int8", "--out", tmp_path / "o").code == 0
    assert manifest(tmp_path / "o")["settings"]["steering"] == {"int8": True}
    assert "other settings" in refused("sample", dar_model, *words, "--out", tmp_path / "o")


def test_a_layout_is_kept(isthmus, refused, dar_model, layout_image, tmp_path):
    out = tmp_path / "o"
    words = ("--classes", "flag", "--num", 2, "--prefix-image", layout_image, "--prefix-tokens", 6, "--out", out)
    assert isthmus("sample", dar_model, *words).code == 0
    pipe = load_pipeline(dar_model)
    with Image.open(layout_image) as picture:
        again = pipe("flag", num_images=2, seed=0, prefix_image=picture, prefix_tokens=6)
        kept = pipe.encode(picture)[:, :6]
    assert token_hashes([again.token_ids]) == hashes(out)
    assert (again.token_ids[:, :6] == kept).all()
    assert "steering differ" in refused("sample", dar_model, "--classes", "flag", "--num", 2, "--out", out)
    Image.new("RGB", (8, 8)).save(layout_image)
    assert "steering differ" in refused("sample", dar_model, *words)


def test_bad_arguments_write_nothing(refused, dar_model, layout_image, tmp_path):
    (tmp_path / "broken.png").write_bytes(layout_image.read_bytes()[:60])
    for words, said in [
        ("--solver heun", "--solver takes one of"),
        ("--refine masked", "no token again"),
        ("--smooth", "smooth"),
        ("--prefix-image LAYOUT", "--prefix-tokens"),
        ("--prefix-image LAYOUT --prefix-tokens 17", "0..16"),
        ("--prefix-image nowhere.png --prefix-tokens 1", "nowhere.png"),
        ("--prefix-image BROKEN --prefix-tokens 1", "cannot be read"),
    ]:
        words = words.replace("LAYOUT", str(layout_image)).replace("BROKEN", str(tmp_path / "broken.png"))
        assert said in refused("sample", dar_model, "--out", tmp_path / "o", *words.split())
    assert not (tmp_path / "o").exists()


def test_prompts_are_taken_in_turn(isthmus, refused, layout_image, tmp_path):
    pipe = tiny_dar(num_classes=0, names=False, words=WORDS, sampling_defaults={"guidance_scale": 2.0})
    pipe.save_pretrained(tmp_path / "text")
    (tmp_path / "more.txt").write_text("ein Häuschen 🏠\n\n" + "dome " * 30 + "long\n")
    words = ("--prompt", "a critter", "--prompts", tmp_path / "more.txt", "--num", 5, "--negative-prompt", "a dome")
    for size in (1, 4):
        out = ("--out", tmp_path / f"by{size}", "--batch-size", size)
        result = isthmus("sample", tmp_path / "text", *words, *out, "--grid", "--strip")
        assert result.code == 0 and "only 12 are read" in result.err, result
    assert hashes(tmp_path / "by1") == hashes(tmp_path / "by4")
    prompts = manifest(tmp_path / "by1")["settings"]["prompts"]
    drawn = pipe(prompt=prompts, num_images=5, seed=0, negative_prompt="a dome").token_ids
    assert hashes(tmp_path / "by1") == token_hashes([drawn])
    kept = ("--prefix-image", layout_image, "--prefix-tokens", 5)
    assert isthmus("sample", tmp_path / "text", *words, *kept, "--out", tmp_path / "kept").code == 0
    out = ("--out", tmp_path / "o")
    assert "has no classes" in refused("-q", "sample", tmp_path / "text", "--classes", "face", *out)
    told = isthmus("info", tmp_path / "text").out
    assert f"up to 12 words, of {WORDS.num_words}" in told
    assert isthmus("export", "llama", tmp_path / "text", "--out", tmp_path / "llama").code == 0
    assert (tmp_path / "llama" / "tokenizer.json").is_file() and not (tmp_path / "o").exists()
