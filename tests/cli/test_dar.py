"""Commands on models of the D-AR family."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from isthmus.pipelines.loading import load_pipeline
from tests.parity.published_dar_files import write_published_files
from tests.pipelines.tiny_dar import tiny_dar
from tests.testers import token_hashes


@pytest.fixture(scope="module")
def dar_model(tmp_path_factory):
    """A saved D-AR pipeline with three classes."""
    folder = tmp_path_factory.mktemp("cli") / "tiny-dar"
    data = {"name": "drawings", "attribution": "CC0"}
    tiny_dar(sampling_defaults={"guidance_scale": 2.0, "top_k": 8}, data=data).save_pretrained(folder)
    return folder


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


def test_8_bit_weights_are_part_of_the_settings(isthmus, refused, dar_model, model, tmp_path):
    words = ("--num", 2, "--seed", 5)
    assert isthmus("sample", dar_model, *words, "--int8", "--out", tmp_path / "o").code == 0
    assert manifest(tmp_path / "o")["settings"]["steering"] == {"int8": True}
    assert "other settings" in refused("sample", dar_model, *words, "--out", tmp_path / "o")
    assert "has no int8" in refused("sample", model, *words, "--int8", "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--steps 0", "num_inference_steps"),
        ("--solver heun", "--solver takes one of"),
        ("--smooth", "smooth"),
        ("--refine masked", "no token again"),
        ("--guidance 1,2", "one value per step (16)"),
        ("--prefix-tokens 3", "--prefix-image"),
        ("--prefix-image LAYOUT", "--prefix-tokens"),
        ("--prefix-image LAYOUT --prefix-tokens 17", "0..16"),
        ("--prefix-image nowhere.png --prefix-tokens 1", "nowhere.png"),
        ("--prefix-image BROKEN --prefix-tokens 1", "cannot be read"),
    ],
)
def test_bad_arguments_write_nothing(refused, dar_model, layout_image, tmp_path, words, said):
    (tmp_path / "broken.png").write_bytes(layout_image.read_bytes()[:60])
    words = words.replace("LAYOUT", str(layout_image)).replace("BROKEN", str(tmp_path / "broken.png"))
    assert said in refused("sample", dar_model, "--out", tmp_path / "o", *words.split())
    assert not (tmp_path / "o").exists()


def test_the_other_family_has_no_solver(refused, model, layout_image, tmp_path):
    assert "num_inference_steps" in refused("sample", model, "--steps", 3, "--out", tmp_path / "o")
    words = ("--prefix-image", layout_image, "--prefix-tokens", 1, "--out", tmp_path / "o")
    assert "prefix_image, prefix_tokens" in refused("sample", model, *words)
    assert not (tmp_path / "o").exists()


def test_a_model_in_a_few_lines(isthmus, dar_model):
    said = isthmus("info", dar_model).out
    for part in ("8 px (patches of 2)", "16 in 4 groups", "4, adams-bashforth", "16 codes of width 4", "3: face, flag"):
        assert part in said
    assert "width 16, 2 layers, 2 heads" in said and "top_k 8" in said and "CC0" in said


def test_the_card_lists_what_would_be_sent(isthmus, dar_model):
    said = isthmus("info", dar_model, "--card").out
    files = {path.relative_to(dar_model).as_posix() for path in dar_model.rglob("*") if path.is_file()}
    assert all(name in said for name in files)


@pytest.mark.slow
def test_published_weights_become_a_pipeline(isthmus, golden, tmp_path):
    tokenizer, prior = write_published_files(golden, tmp_path)
    words = ("convert", "dar", "--tokenizer", tokenizer, "--prior", prior, "--num-heads", 4, "--out", tmp_path / "m")
    result = isthmus(*words)
    assert result.code == 0, result.err
    assert "repa_out" in result.err and "alignment head" in result.err
    assert isthmus("sample", tmp_path / "m", "--classes", 3, "--num", 2, "--out", tmp_path / "o").code == 0
    assert re.search(r"^classes +10\b", isthmus("info", tmp_path / "m").out, re.MULTILINE)


def test_bare_weights_need_the_settings_that_shapes_do_not_tell(isthmus, refused, golden, tmp_path):
    files = ("--tokenizer", golden.path("dar/tok_a_weights.safetensors"), "--prior",
             golden.path("dar/gpt_weights.safetensors"))  # fmt: skip
    settings = ("--num-heads", 4, "--num-tokens", 32, "--image-size", 32)
    assert isthmus("convert", "dar", *files, *settings, "--out", tmp_path / "m").code == 0
    pipe = load_pipeline(tmp_path / "m")
    assert pipe.token_layout.num_tokens == 32 and pipe.scheduler.config["data_std"] == 0.6
    published = load_file(tmp_path / "m" / "transformer" / "model.safetensors")
    assert len(published["lm_head.weight"]) == 139
    assert "new or empty" in refused("convert", "dar", *files, *settings, "--out", tmp_path / "m")


def test_files_that_do_not_belong_together(refused, golden, tmp_path):
    tokenizer, prior = write_published_files(golden, tmp_path)
    out = ("--out", tmp_path / "m")
    (tmp_path / "names.txt").write_text("one\n")
    for words, said in [
        (("--tokenizer", prior, "--prior", tokenizer, "--num-heads", 4), "it is a D-AR prior"),
        (("--tokenizer", tokenizer, "--prior", tmp_path / "nowhere.pt"), "does not exist"),
        (("--tokenizer", golden.path("dar/tok_b_weights.safetensors"), "--prior", prior, "--num-heads", 4),
         "codebook_size"),
        (("--tokenizer", tokenizer, "--prior", prior, "--num-heads", 4, "--class-names", tmp_path / "names.txt"),
         "10 classes, got 1"),
    ]:  # fmt: skip
        assert said in refused("-q", "convert", "dar", *words, *out)
        assert not (tmp_path / "m").exists()


def test_the_prior_leaves_as_a_stock_llama(isthmus, refused, dar_model, model, tmp_path):
    result = isthmus("export", "llama", dar_model, "--out", tmp_path / "llama")
    assert result.code == 0 and "README" in result.err
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= {
        path.name for path in (tmp_path / "llama").iterdir()
    }
    assert "new or empty" in refused("export", "llama", dar_model, "--out", tmp_path / "llama")
    assert "only D-AR models" in refused("export", "llama", model, "--out", tmp_path / "other")
    assert "does not exist" in refused("export", "llama", tmp_path / "nowhere", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()
