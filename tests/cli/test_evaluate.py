"""`isthmus evaluate` and `isthmus compare`: a tiny model on a folder of images, end to end."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from isthmus.data.avatars import attribute_names
from isthmus.evaluation import alignment
from isthmus.evaluation.adm_npz import read_adm_images
from isthmus.evaluation.alignment import COMBINATIONS, RECONSTRUCTIONS, SEEDS
from isthmus.evaluation.attributes import DRAWINGS, PASSES, attribute_readers
from isthmus.evaluation.guards import BUILT_IN_SENTENCE
from isthmus.evaluation.record import read_record, write_record
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.pictures import save_picture
from isthmus.samples import read
from tests.pipelines.tiny import tiny_pipeline, tiny_text_pipeline
from tests.pipelines.tiny_dar import tiny_dar

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
NUM = 12
CLASSES = ("face", "flag", "hand")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """24 images of three classes, 8 px, with some held out."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for part, count in (("train", 10), ("val", 6)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def evaluate(isthmus, model, images):
    """Run `isthmus evaluate` on the tiny model."""

    def run(out, *words, model=model, data=images):
        result = isthmus("evaluate", model, "--data", f"folder:{data}", "--num", NUM, "--out", out, *words)
        assert result.code == 0, result.err
        return result

    return run


def scores(folder):
    record = read_record(folder)
    return {score.name: score.value for score in record.scores + record.held_out}


def hashes(folder):
    return [row["token_ids_sha256"] for row in read(folder / "samples").rows]


def same_scores(first, second):
    ours, theirs = scores(first), scores(second)
    assert set(ours) == set(theirs) and len(ours) > 10
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), name


def test_batch_size_and_processes_change_nothing(evaluate, isthmus, model, images, tmp_path):
    """Two processes under torchrun, one process, one image at a time: equal tokens, equal scores."""
    evaluate(tmp_path / "a", "--batch-size", 1)
    evaluate(tmp_path / "b", "--batch-size", 5)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["evaluate", str(model), "--data", f"folder:{images}", "--num", str(NUM), "--out", str(tmp_path / "c")]
    # after "--", or torchrun takes our --num for its --numa-binding
    subprocess.run([*launch, "-m", "--", "isthmus", *words], cwd=REPOSITORY, check=True)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")
    same_scores(tmp_path / "a", tmp_path / "b")
    same_scores(tmp_path / "a", tmp_path / "c")
    assert read_record(tmp_path / "c").circumstances["processes"] == 2
    table = isthmus("compare", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--out", tmp_path / "t.md")
    assert table.code == 0 and "KD-lite0-192" in table.out and (tmp_path / "t.md").read_text() == table.out


def test_samples_npz_scored_as_anyones_images_gives_the_same_numbers(evaluate, isthmus, refused, images, tmp_path):
    evaluate(tmp_path / "a", "--npz", "--statistics", "--sweep-guidance", "1,3")
    written = read_adm_images(tmp_path / "a" / "samples.npz")
    assert len(written) == NUM and written.labels is not None and set(written.labels) == {0, 1, 2}
    words = ("--data", f"folder:{images}", "--out", tmp_path / "b")
    assert isthmus("evaluate", "--samples", tmp_path / "a" / "samples.npz", *words).code == 0
    ours, theirs = scores(tmp_path / "a"), scores(tmp_path / "b")
    assert theirs and all(ours[name] == pytest.approx(value, rel=1e-6) for name, value in theirs.items())
    record = read_record(tmp_path / "a")
    assert list(record.sweep) == ["1", "3"] and record.protocol.balance == "every class equally often"
    assert record.protocol.reference == f"18 held-out images of folder:{images}"
    assert record.subject.seed == 0 and record.subject.sampling["guidance_scale"] == 2.0
    for name in ("report.md", "report.html", "samples.png", "neighbours.png", "curves.png", "sweep.png"):
        assert (tmp_path / "a" / name).is_file(), name
    assert isthmus("compare", tmp_path / "a", tmp_path / "b").code == 0, "one protocol: the classes are as frequent"
    # a file of the samples themselves, and images of a folder, as the reference
    words = ("--samples", tmp_path / "a", "--reference", images / "val", "--out", tmp_path / "c")
    assert isthmus("evaluate", *words).code == 0
    assert "class" not in " ".join(scores(tmp_path / "c")), "no data set, no classes"
    assert "training images" in refused("compare", tmp_path / "a", tmp_path / "c")
    # against their own mean and covariance the samples are at no distance
    words = ("--samples", tmp_path / "a", "--reference", tmp_path / "a" / "statistics.npz", "--out", tmp_path / "d")
    assert isthmus("evaluate", *words).code == 0
    assert scores(tmp_path / "d")["FD-lite0-192"] == pytest.approx(0, abs=1e-6)
    # an image of the sweep that equals another one is said with its guidance
    swept = read(tmp_path / "a" / "sweep" / "3")
    with Image.open(swept.folder / "000001.png") as image:
        text = {name: value for name, value in image.info.items()}
    save_picture(Image.fromarray(swept.image(0)), swept.folder / "000001.png", text)
    (tmp_path / "a" / "evaluation.json").unlink()
    evaluate(tmp_path / "a", "--sweep-guidance", "1,3")
    assert [one for one in read_record(tmp_path / "a").warnings if one.startswith("Guidance 3: 1 of 12 images")]


def test_a_finished_evaluation_is_not_done_again(evaluate, refused, model, images, tmp_path):
    evaluate(tmp_path / "a")
    before = (tmp_path / "a" / "evaluation.json").stat().st_mtime_ns
    samples = (tmp_path / "a" / "samples" / "000000.png").stat().st_mtime_ns
    (tmp_path / "a" / "report.md").unlink()
    evaluate(tmp_path / "a", "--batch-size", 2)
    assert (tmp_path / "a" / "report.md").is_file()
    assert (tmp_path / "a" / "evaluation.json").stat().st_mtime_ns == before
    assert (tmp_path / "a" / "samples" / "000000.png").stat().st_mtime_ns == samples
    # -q: the folder's own notice is no part of the refusal
    words = ("-q", "evaluate", model, "--data", f"folder:{images}", "--num", NUM, "--out", tmp_path / "a")
    assert "seed" in refused(*words, "--seed", 1)
    assert "sampling" in refused(*words, "--guidance", 1)


def test_an_evaluation_with_chunks_of_an_earlier_version(evaluate, refused, model, images, tmp_path):
    """A finished one is read as it is; where samples are needed, words say what to do."""
    evaluate(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "samples")
    (tmp_path / "a" / "samples").mkdir()
    (tmp_path / "a" / "samples" / "chunk_00000.npz").write_bytes(b"")
    before = (tmp_path / "a" / "evaluation.json").stat().st_mtime_ns
    (tmp_path / "a" / "report.md").unlink()
    evaluate(tmp_path / "a")
    assert (tmp_path / "a" / "report.md").is_file()
    assert (tmp_path / "a" / "evaluation.json").stat().st_mtime_ns == before
    words = ("-q", "evaluate", model, "--data", f"folder:{images}", "--num", NUM, "--out", tmp_path / "a")
    assert "other weights or options" in refused(*words, "--seed", 1)
    assert "an earlier version" in refused(*words, "--npz")
    (tmp_path / "a" / "evaluation.json").unlink()
    assert "delete the folder to draw them again" in refused(*words)


def test_samples_of_an_earlier_number_do_not_stay(evaluate, tmp_path):
    evaluate(tmp_path / "a", "--npz", "--statistics")
    evaluate(tmp_path / "a", "--num", NUM - 2)
    assert read_record(tmp_path / "a").protocol.num_samples == NUM - 2
    assert not any((tmp_path / "a" / name).exists() for name in ("samples.npz", "statistics.npz"))


def test_what_stops_the_held_out_stage_does_not_cost_the_scores(evaluate, tmp_path):
    """A record without measures of held-out images, as a process leaves it that is killed there, is completed."""
    evaluate(tmp_path / "a")
    whole = read_record(tmp_path / "a")
    kept = replace(whole, held_out=(), curves=(), measures={}, circumstances=whole.circumstances | {"kept": "yes"})
    write_record(kept, tmp_path / "a")
    evaluate(tmp_path / "a")
    after = read_record(tmp_path / "a")
    assert after.circumstances["kept"] == "yes", "not scored again"
    assert (after.held_out, after.curves, after.measures) == (whole.held_out, whole.curves, whole.measures)


def test_a_built_in_set_is_its_own_reference_with_its_sentence(isthmus, tmp_path):
    """A model of two photographs: the share of copies stands beside the distances to its own training images."""
    classes = ["rocket", "coffee"]
    pipeline = tiny_pipeline(num_classes=2, names=False)
    named = NextScalePipeline(pipeline.image_tokenizer, pipeline.transformer, class_names=classes)
    named.save_pretrained(tmp_path / "model")
    words = ("evaluate", tmp_path / "model", "--data", "photos", "--num", NUM)
    assert isthmus(*words, "--out", tmp_path / "a").code == 0
    record = read_record(tmp_path / "a")
    assert record.protocol.reference == "512 training and 100 held-out images of photos"
    assert BUILT_IN_SENTENCE in record.warnings
    share = record.score("memorised share")
    assert share is not None and share.ceiling is not None and 0 <= share.value <= 1


def test_a_model_is_measured_against_images_of_a_file(evaluate, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (2 * NUM, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", pictures)
    evaluate(tmp_path / "a", "--reference", tmp_path / "images.npz")
    record = read_record(tmp_path / "a")
    assert (record.protocol.reference, record.protocol.chunk_images) == ("24 images of images.npz", NUM)
    assert {"KD-lite0-192", "memorised share"} <= set(scores(tmp_path / "a")) and record.warnings


def test_more_training_images_are_another_protocol(isthmus, model, images, tmp_path):
    """The same command after an image was added: scored again, with the samples that are there."""
    data = Path(shutil.copytree(images, tmp_path / "data"))
    command = ("evaluate", model, "--data", f"folder:{data}", "--num", NUM, "--out", tmp_path / "a")
    assert isthmus(*command).code == 0
    samples = tmp_path / "a" / "samples" / "000000.png"
    before, drawn = read_record(tmp_path / "a"), samples.stat().st_mtime_ns
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(data / "train" / "face" / "new.png")
    assert isthmus(*command).code == 0
    after = read_record(tmp_path / "a")
    assert after.data["training images"] == before.data["training images"] + 1
    assert after.protocol.train_sha256 != before.protocol.train_sha256 and samples.stat().st_mtime_ns == drawn


def test_samples_without_names_of_classes_have_no_class_scores(isthmus, images, tmp_path):
    """Numbers of classes are those of whoever drew them: the report says why class scores are missing."""
    for num_labels in (3, 1):
        file, out = tmp_path / f"{num_labels}.npz", tmp_path / f"{num_labels}"
        rng = np.random.default_rng(0)
        np.savez(file, rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) % num_labels)
        assert isthmus("evaluate", "--samples", file, "--data", f"folder:{images}", "--out", out).code == 0
        record = read_record(out)
        (warning,) = (warning for warning in record.warnings if "without names" in warning)
        assert ("one label" in warning) == (num_labels == 1)
        assert not any("class" in score.name for score in record.scores)


def test_of_several_processes_one_scores_images(isthmus, images, tmp_path, monkeypatch):
    # not a mock: the environment that torchrun gives the second of two processes
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ("--samples", images / "val", "--reference", images / "train", "--out", tmp_path / "a")
    assert isthmus("evaluate", *words).code == 0 and not (tmp_path / "a").exists()


def test_d_ar_and_unlabelled_models(evaluate, refused, images, tmp_path):
    tiny_dar().save_pretrained(tmp_path / "dar")
    evaluate(tmp_path / "a", "--steps", 2, "--guidance", 1.5, "--balance", "data", model=tmp_path / "dar")
    before = read_record(tmp_path / "a")
    assert not any(curve.along == "solver steps" for curve in before.curves)
    # asked for more, the same samples are measured again
    again = ("--steps", 2, "--guidance", 1.5, "--balance", "data", "--solver-steps", "1,2")
    evaluate(tmp_path / "a", *again, model=tmp_path / "dar")
    record = read_record(tmp_path / "a")
    assert record.scores == before.scores and record.held_out == before.held_out
    solved = [curve for curve in record.curves if curve.along == "solver steps"]
    names = [(curve.name, curve.positions) for curve in solved]
    # 8 px are too small for SSIM and LPIPS
    assert names == [(name, ("1", "2")) for name in ("PSNR, dB", "lite0 distance", "r-FD-lite0-192")]
    by_position = next(curve for curve in record.curves if curve.along == "position of the token")
    bits = next(score.value for score in record.held_out if score.name == "bits per token")
    assert len(by_position.values) > 1 and np.mean(by_position.values) == pytest.approx(bits, rel=1e-6)
    # the data have as many images of each class
    assert record.subject.steering == {"num_inference_steps": 2}
    assert record.protocol.balance == "every class equally often"
    assert {"bits per token", "PSNR, dB", "r-FD-lite0-192"} <= set(scores(tmp_path / "a"))
    tiny_pipeline(num_classes=0).save_pretrained(tmp_path / "unlabelled")
    evaluate(tmp_path / "b", model=tmp_path / "unlabelled")
    assert not any("class" in name for name in scores(tmp_path / "b"))
    assert "memorised share" in scores(tmp_path / "b")
    words = ("--data", f"folder:{images}", "--num", NUM, "--balance", "data", "--out", tmp_path / "c")
    assert "the model is unlabelled" in refused("-q", "evaluate", tmp_path / "unlabelled", *words)


def test_a_model_of_texts_is_told_captions(isthmus, evaluate, refused, model, images, tmp_path):
    tiny_text_pipeline().save_pretrained(tmp_path / "words")
    told = tmp_path / "told"
    shutil.copytree(images, told)
    for picture in told.glob("*/*/*.png"):
        picture.with_suffix(".txt").write_text(f"a {picture.parent.name} numbered {picture.stem}")
    words = ("--data", f"folder:{told}", "--num", NUM)
    assert isthmus("evaluate", tmp_path / "words", *words, "--out", tmp_path / "a", "--batch-size", 5).code == 0
    rows = read(tmp_path / "a" / "samples").rows
    assert {row["prompt"] for row in rows} == {f"a {name} numbered {i}" for name in CLASSES for i in range(4)}
    record = read_record(tmp_path / "a")
    assert record.protocol.balance == "every class equally often" and record.readings is None
    assert "captions of 18 held-out images" in (tmp_path / "a" / "report.md").read_text()
    assert {"bits per token without words", "class accuracy (nearest mean)"} <= set(scores(tmp_path / "a"))
    # a model of classes on the same images is measured alike
    evaluate(tmp_path / "b", data=told)
    assert isthmus("compare", tmp_path / "a", tmp_path / "b").code == 0
    # other captions, other samples
    next(told.glob("val/*/*.txt")).write_text("another")
    assert "captions differ" in refused("-q", "evaluate", tmp_path / "words", *words, "--out", tmp_path / "a")
    nothing = ("--data", f"folder:{images}", "--num", NUM, "--out", tmp_path / "c")
    assert "images with captions" in refused("-q", "evaluate", tmp_path / "words", *nothing)
    wanted = ("--attributes", "eyes")
    assert "attributes are those of avatars" in refused("-q", "evaluate", model, *nothing, *wanted)
    assert not (tmp_path / "c").exists()


def test_attributes_of_avatars_are_found_in_samples(isthmus, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("ISTHMUS_CACHE", str(cache))
    # of ten drawings one has a combination that is held out
    monkeypatch.setattr(alignment, "COMBINATIONS_LIMIT", 64)
    # a reader that has seen little stands for the one of the cache, which takes longer
    attribute_readers(8, ("gaze",), drawings=128, passes=1)
    (little,) = (cache / "attribute-readers").glob("gaze-*")
    little.rename(little.with_name(f"gaze-8px-{DRAWINGS}x{PASSES}-seed0"))
    tiny_text_pipeline().save_pretrained(tmp_path / "words")
    words = (tmp_path / "words", "--data", "avatars:gaze", "--max-images", 100, "--num", NUM, "--out", tmp_path / "a")
    assert isthmus("evaluate", *words, "--sweep-guidance", "3").code == 0
    record = read_record(tmp_path / "a")
    asked = (SEEDS, RECONSTRUCTIONS, COMBINATIONS)
    kinds = [f"{what} right, {of}" for of in asked for what in ("attributes", "combinations")]
    assert [score.name for score in record.scores[1:7]] == kinds
    assert [score.name for score in record.sweep["3"] if "right" in score.name] == kinds[:2]
    assert len(read(tmp_path / "a" / "combinations")) == NUM and (tmp_path / "a" / "attributes.png").is_file()
    assert "## Attributes" in (tmp_path / "a" / "report.md").read_text()
    assert record.readings is not None and record.readings.attributes == attribute_names("gaze")
    before = (tmp_path / "a" / "evaluation.json").stat().st_mtime_ns
    assert isthmus("evaluate", *words, "--sweep-guidance", "3").code == 0
    assert (tmp_path / "a" / "evaluation.json").stat().st_mtime_ns == before
    # asked for fewer, the same samples are scored again
    assert isthmus("evaluate", *words, "--attributes", "eyes,shape").code == 0
    again = read_record(tmp_path / "a").readings
    assert again is not None and again.attributes == ("eyes", "shape")
    ours, theirs = ([one for one in found.counts if one.attribute == "eyes"] for found in (record.readings, again))
    assert ours == theirs


def test_what_misleads_is_refused(refused, model, images, tmp_path):
    good = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    arrays = {"NPZ": good, "FLOATS": good / 255, "ONES": good // 128, "COPIES": np.repeat(good[:1], 8, axis=0)}
    for name, array in (arrays | {"LARGE": np.repeat(good, 2, axis=1)}).items():
        np.savez(tmp_path / f"{name}.npz", array)
    np.savez(tmp_path / "STATS.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    places = {path.stem: path for path in tmp_path.iterdir()}
    places |= {"MODEL": model, "DATA": f"folder:{images}", "TRAIN": images / "train"}
    for words, said in [
        ("MODEL", "--data"),
        ("--data openmoji", "a model or --samples"),
        ("MODEL --samples NPZ", "a model or --samples"),
        ("--samples NPZ", "no --reference"),
        ("--samples NPZ --reference NPZ --seed 1", "--seed"),
        ("--samples NPZ --reference NPZ --classes face", "--classes"),
        ("--samples NPZ --reference NPZ --label-column kind", "--label-column"),
        ("MODEL --data DATA --num 1", "--num"),
        ("MODEL --data DATA --sweep-guidance 1,1.0", "twice"),
        ("MODEL --data DATA --num 4 --classes fcae", "face"),
        ("MODEL --data DATA --num 4 --features vgg", "lite0"),
        ("MODEL --data DATA --num 4 --features inception:none.pth", "none.pth"),
        ("MODEL --data DATA --num 4 --solver euler", "no solver"),
        ("MODEL --data DATA --num 4 --solver-steps 4", "D-AR"),
        ("MODEL --data DATA --num 4 --lpips-weights none.pth", "16 pixels"),
        ("MODEL --data DATA --num 4 --reference nowhere", "nowhere"),
        ("MODEL --data DATA --num 4 --reference TRAIN", "copying them would score best"),
        ("MODEL --data DATA --num 4 --reference STATS", "2048"),
        ("--samples FLOATS --reference NPZ", "uint8"),
        ("--samples ONES --reference NPZ", "[0, 1]"),
        ("--samples COPIES --reference NPZ", "must differ"),
        ("--samples LARGE --reference NPZ", "one size"),
    ]:
        text = [str(places.get(word, word)) for word in words.split()]
        assert said in refused("-q", "evaluate", *text, "--out", tmp_path / "out")
        assert not (tmp_path / "out" / "evaluation.json").exists()
    assert "at least two" in refused("compare", tmp_path)
    assert "holds no evaluation.json" in refused("compare", tmp_path, tmp_path)
