import json
import resource

import pytest
from PIL import Image

from isthmus.next_scale.refinement import ScaleRefinementScheduler
from isthmus.pipelines.loading import load_pipeline
from tests.pipelines.tiny import SIZED, tiny_pipeline, tiny_text_pipeline
from tests.testers import token_hashes


def manifest(folder):
    return json.loads((folder / "samples.json").read_text())


def hashes(folder):
    return [row["token_ids_sha256"] for row in manifest(folder)["images"]]


def test_an_image_says_how_to_draw_it_again(isthmus, model, tmp_path):
    words = "--classes flag,0,null --guidance linear:1:3:1-1 --top-k 5 --top-p off --temperature 1,0.9,0.5 --num 4"
    words = words.split()
    assert isthmus("sample", model, "--out", tmp_path / "o", *words).code == 0
    with Image.open(tmp_path / "o" / "000003.png") as image:
        text = image.info
    assert (text["label"], text["seed"], text["index"]) == ("flag", "0", "3")
    pipe = load_pipeline(model)
    assert text["model"] == pipe.fingerprint
    options = pipe.defaults.from_dict(json.loads(text["settings"])["sampling"])
    again = pipe(text["label"], seed=int(text["seed"]), image_index=int(text["index"]), **vars(options))
    assert token_hashes(again.token_ids) == [text["token_ids_sha256"]]
    assert [row["label"] for row in manifest(tmp_path / "o")["images"]] == ["flag", "face", "null", "flag"]


def test_grid_and_strip(isthmus, model, tmp_path):
    result = isthmus("-q", "sample", model, "--num", 6, "--out", tmp_path / "o", "--grid", "--strip")
    assert result.code == 0 and result.err == ""
    with Image.open(tmp_path / "o" / "grid.png") as grid, Image.open(tmp_path / "o" / "strip.png") as strip:
        assert grid.height == 3 * 66 and grid.width > 2 * 66
        assert strip.height > 6 * 66 and strip.width > 3 * 66
    assert isthmus("sample", model, "--classes", "face", "--num", 9, "--out", tmp_path / "one", "--grid").code == 0
    with Image.open(tmp_path / "one" / "grid.png") as grid:
        assert grid.height == 2 * 66
    tiny_pipeline(num_classes=0).save_pretrained(tmp_path / "model")
    assert isthmus("sample", tmp_path / "model", "--num", 2, "--out", tmp_path / "p", "--grid").code == 0


@pytest.mark.slow
def test_refinement_is_an_option_of_a_draw(isthmus, refused, model, tmp_path):
    for mode in ("default", "none", "masked", "simple"):
        words = () if mode == "default" else ("--refine", mode)
        assert isthmus("sample", model, "--num", 4, "--seed", 3, "--out", tmp_path / mode, *words).code == 0
    assert hashes(tmp_path / "none") == hashes(tmp_path / "default")
    for mode in ("masked", "simple"):
        pipe = load_pipeline(model)
        pipe.refine_with(mode)
        drawn = pipe([i % 3 for i in range(4)], seed=3).token_ids
        assert hashes(tmp_path / mode) == token_hashes(drawn) != hashes(tmp_path / "default")
    assert "model" in refused("-q", "sample", model, "--refine", "simple", "--seed", 3, "--out", tmp_path / "masked")


@pytest.mark.slow
def test_forwards_are_part_of_the_record(isthmus, model, tmp_path):
    """Of every image, whoever drew it: in batches of another size, now or before."""
    pipe = load_pipeline(model)
    for mode, count in (("none", 3), ("masked", 5)):
        pipe.refine_with(mode)
        assert pipe([0, 1], seed=0).num_forwards == count
        words = ("sample", model, "--refine", mode, "--out", tmp_path / mode)
        assert f"; {count} forwards each" in isthmus(*words, "--num", 3, "--batch-size", 1).err
        assert f"(2 drawn now); {count} forwards each" in isthmus(*words, "--num", 5, "--batch-size", 4).err
        assert f"(0 drawn now); {count} forwards each" in isthmus(*words, "--num", 5).err
        assert manifest(tmp_path / mode)["forwards_per_image"] == {"least": count, "most": count}
    # a range where they depend on the draw
    scheduler = ScaleRefinementScheduler(mode="masked", p_min=0.05)
    tiny_pipeline(scheduler=scheduler).save_pretrained(tmp_path / "model")
    for size in (1, 4):
        out = tmp_path / f"by{size}"
        result = isthmus("sample", tmp_path / "model", "--num", 4, "--out", out, "--batch-size", size)
        assert "3 to 5 forwards each" in result.err
        assert manifest(out)["forwards_per_image"] == {"least": 3, "most": 5}


@pytest.mark.slow
def test_a_folder_goes_on_whichever_way_nothing_is_refined(isthmus, model, tmp_path):
    out = tmp_path / "o"
    assert isthmus("sample", model, "--num", 2, "--out", out).code == 0
    # as a version wrote it that did not count forwards
    before = manifest(out)
    del before["forwards_per_image"]
    (out / "samples.json").write_text(json.dumps(before))
    assert "(1 drawn now)" in isthmus("sample", model, "--refine", "none", "--num", 3, "--out", out).err
    assert manifest(out)["images"][:2] == before["images"] and "forwards_per_image" in manifest(out)


@pytest.mark.slow
def test_running_again_draws_what_is_missing_and_overwrites_nothing(isthmus, refused, model, tmp_path):
    out = tmp_path / "o"
    result = isthmus("sample", model, "--num", 5, "--seed", 5, "--out", out, "--batch-size", 3)
    assert result.code == 0 and "5 images" in result.err and result.out == ""
    before = hashes(out)
    (out / "000002.png").unlink()
    assert "(1 drawn now)" in isthmus("sample", model, "--num", 5, "--seed", 5, "--out", out).err
    assert "(3 drawn now)" in isthmus("sample", model, "--num", 8, "--seed", 5, "--out", out).err
    # asked for fewer, a folder is filled with what it was asked for before
    (out / "000007.png").unlink()
    assert "8 images" in isthmus("sample", model, "--num", 2, "--seed", 5, "--out", out).err
    assert hashes(out)[:5] == before and len(hashes(out)) == 8
    assert "seed differ" in refused("sample", model, "--num", 5, "--out", out)


def test_bad_arguments_write_nothing(refused, model, tmp_path):
    """Those that the command line looks at itself, and one of each place behind it."""
    for words, said in [
        ("--num 0", "--num"),
        ("--seed=-1", "--seed"),
        ("--batch-size 0", "--batch-size"),
        ("--guidance strong", "linear:START:END"),
        ("--prefix-tokens 3", "--prefix-image"),
        ("--device cuda:99", "present here"),
        ("--classes fcae", "Did you mean face"),
        ("--top-k 17", "1..16"),
        ("--int8", "has no int8"),
        ("--steps 3", "num_inference_steps"),
    ]:
        assert said in refused("sample", model, "--out", tmp_path / "o", *words.split())
    assert "does not exist" in refused("sample", tmp_path / "nowhere", "--out", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_no_half_files(refused, model, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # every longer file fails, as on a full disk
    try:
        assert "Free some space" in refused("sample", model, "--num", 2, "--out", tmp_path / "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "tiny"
    tiny_text_pipeline(sampling_defaults={"guidance_scale": 2.0}).save_pretrained(folder)
    return folder


def test_prompts_are_taken_in_turn(isthmus, text_model, tmp_path):
    (tmp_path / "more.txt").write_text("ein Häuschen 🏠, grün\n\n" + "very " * 30 + "long\n")
    words = ("--prompt", "a critter, dome body", "--prompt", "a planet", "--prompts", tmp_path / "more.txt", "--num", 6)
    for size in (1, 4):
        out = ("--out", tmp_path / f"by{size}", "--batch-size", size)
        result = isthmus("sample", text_model, *words, *out, "--grid", "--strip", "--negative-prompt", "a cat")
        assert result.code == 0, result
    assert hashes(tmp_path / "by1") == hashes(tmp_path / "by4")
    written = manifest(tmp_path / "by1")
    prompts = written["settings"]["prompts"]
    assert prompts[:3] == ["a critter, dome body", "a planet", "ein Häuschen 🏠, grün"] and len(prompts) == 4
    assert [row["prompt"] for row in written["images"]] == [*prompts, *prompts[:2]]
    assert written["settings"]["steering"] == {"negative_prompt": "a cat"}
    drawn = load_pipeline(text_model)(prompt=prompts, num_images=6, seed=0, negative_prompt="a cat").token_ids
    assert hashes(tmp_path / "by1") == token_hashes(drawn)
    (tmp_path / "by1" / "000002.png").unlink()
    again = isthmus("sample", text_model, *words, "--out", tmp_path / "by1", "--negative-prompt", "a cat")
    assert "(1 drawn now" in again.err and manifest(tmp_path / "by1") == written


def test_the_size_that_images_are_drawn_as_if_they_had(isthmus, refused, text_model, tmp_path):
    pipe = tiny_text_pipeline(design=SIZED)
    pipe.save_pretrained(tmp_path / "sized")
    asked = ("--prompt", "a cat", "--num", 9, "--image-size-condition")
    assert isthmus("sample", tmp_path / "sized", *asked, "64,640", "--out", tmp_path / "o").code == 0
    plain, sized = (
        token_hashes(pipe(prompt="a cat", num_images=9, seed=0, image_size_condition=sizes).token_ids)
        for sizes in (None, (64, 640))
    )
    assert hashes(tmp_path / "o") == sized != plain
    assert manifest(tmp_path / "o")["settings"]["steering"] == {"image_size_condition": [64, 640]}
    assert "steering differ" in refused("sample", tmp_path / "sized", *asked, 64, 64, "--out", tmp_path / "o")
    assert "no size condition" in refused("sample", text_model, *asked, 64, 64, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_words_that_a_model_cannot_draw(refused, model, dar_model, text_model, tmp_path):
    out = ("--out", tmp_path / "o")
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "reads no text" in refused("-q", "sample", model, "--prompt", "a cat", *out)
    assert "reads no text" in refused("-q", "sample", dar_model, "--prompt", "a cat", *out)
    assert "has no classes" in refused("-q", "sample", text_model, "--classes", "face", *out)
    assert "which has none" in refused("-q", "sample", text_model, "--prompts", tmp_path / "empty.txt", *out)
    assert "cannot be read" in refused("-q", "sample", text_model, "--prompts", tmp_path / "nowhere.txt", *out)
    assert not (tmp_path / "o").exists()


def test_an_edit_follows_its_prompt(isthmus, text_model, tmp_path):
    assert isthmus("sample", text_model, "--num", 1, "--out", tmp_path / "o").code == 0
    assert "prompt" not in manifest(tmp_path / "o")["images"][0]
    image = ("--image", tmp_path / "o" / "000000.png", "--from-scale", 1, "--num", 2)
    words = ("--prompt", "a cat, asleep", "--out", tmp_path / "e")
    assert isthmus("edit", "variations", text_model, *image, *words).code == 0
    assert {row["prompt"] for row in manifest(tmp_path / "e")["images"]} == {"a cat, asleep"}


def test_info_says_how_prompts_are_read(isthmus, text_model, tmp_path):
    told = isthmus("info", text_model).out
    assert "SmallTextEncoder, reads 48 words" in told
    card = isthmus("info", text_model, "--card").out
    assert "null_text.safetensors" in card and 'pipe(prompt="what the image shows", num_images=4' in card
    load_pipeline(text_model).save_pretrained(tmp_path / "m", text_encoder=False)
    assert "left out" in isthmus("info", tmp_path / "m").out
