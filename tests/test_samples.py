"""Samples are a pure function of (model, seed, options, index): no kill, batch size or process changes them."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.errors import UserError
from isthmus.files import claimed
from isthmus.pictures import save_picture
from isthmus.processes import Processes
from isthmus.samples import MANIFEST, SampleRequest, check_folder, draw, file_name, read
from tests.pipelines.tiny import tiny_pipeline, tiny_text_pipeline
from tests.pipelines.tiny_dar import tiny_dar
from tests.testers import token_hashes
from tests.tiny_samples import NUM, REPOSITORY, SEED, tiny_request

BOTH = pytest.mark.parametrize("pipeline", [tiny_pipeline(), tiny_dar()], ids=["next-scale", "d-ar"])


def filled(pipeline, folder, num=NUM, *, batch_size=3, **given):
    drawn = draw(pipeline, folder, tiny_request(pipeline, num), batch_size=batch_size, **given)
    return read(folder), drawn.count


def everything(samples):
    indices = range(len(samples))
    tokens = np.stack([samples.token_ids(index) for index in indices])
    return {"images": np.stack(list(samples)), "labels": samples.labels, "token_ids": tokens}


def same(first, second):
    for name, value in first.items():
        tolerance = 1 if name == "images" else 0
        assert np.allclose(value.astype(int), second[name].astype(int), rtol=0, atol=tolerance), name


@pytest.mark.slow
@BOTH
def test_any_batch_size_and_any_number_of_processes(pipeline, tmp_path):
    whole, drawn = filled(pipeline, tmp_path / "whole", batch_size=64)
    assert drawn == NUM == len(whole)
    reference = everything(whole)
    assert len({row["token_ids_sha256"] for row in whole.rows}) > NUM // 2
    assert reference["images"].shape == (NUM, pipeline.image_size, pipeline.image_size, 3)
    for size in (1, 3):
        same(reference, everything(filled(pipeline, tmp_path / f"by{size}", batch_size=size)[0]))
    request, shared = tiny_request(pipeline), tmp_path / "shared"
    # each process's share; in a launcher they would wait for each other before the rows are listed
    shares = [draw(pipeline, shared, request, batch_size=3, processes=Alone(rank, 2)).count for rank in (1, 0)]
    assert shares == [NUM // 2, NUM // 2]
    same(reference, everything(read(shared, NUM)))


class Alone(Processes):
    """A process of two whose other has ended."""

    def wait(self) -> None:
        pass


@BOTH
def test_an_image_says_how_to_draw_it_again_and_holds_its_tokens(pipeline, tmp_path):
    samples, _ = filled(pipeline, tmp_path / "a")
    with Image.open(tmp_path / "a" / file_name(6)) as image:
        text = dict(image.info)
    again = pipeline(int(text["class_id"]), seed=int(text["seed"]), image_index=int(text["index"]))
    steps = [again.token_ids] if isinstance(again.token_ids, torch.Tensor) else again.token_ids
    assert token_hashes(steps) == [text["token_ids_sha256"]] == [samples.rows[6]["token_ids_sha256"]]
    assert np.array_equal(samples.token_ids(6), torch.cat(list(steps), dim=1)[0].numpy())
    assert np.abs(np.asarray(again.images[0]).astype(int) - samples.image(6)).max() <= 1
    assert text["model"] == pipeline.fingerprint and json.loads(text["settings"]) == samples.settings


def test_an_image_of_words_holds_its_own_and_words_are_read_once(tmp_path, monkeypatch):
    pipeline, folder, prompts = tiny_text_pipeline(), tmp_path / "a", ["a cat", "two dogs", ""] * 2
    classes = {"class_ids": [0], "prompts": prompts[:3]}
    request = SampleRequest.of(pipeline, [0] * 6, classes=classes, seed=3, prompts=prompts, options={"top_k": 9})
    read_now, encode = [], pipeline.text_encoder.encode
    monkeypatch.setattr(pipeline.text_encoder, "encode", lambda words: read_now.extend(words) or encode(words))
    assert draw(pipeline, folder, request, batch_size=1).count == 6 and read_now == prompts[:2]
    samples, path = read(folder), folder / file_name(4)
    with Image.open(path) as image:
        text = dict(image.info)
    assert "a cat" not in str(text) and text["prompt"] == "two dogs"
    settings = json.loads(text["settings"])
    assert settings | {"prompts": prompts[:3]} == samples.settings
    own = pipeline.defaults.from_dict(settings["sampling"])
    again = pipeline(prompt=text["prompt"], seed=int(text["seed"]), image_index=int(text["index"]), **vars(own))
    assert token_hashes(again.token_ids) == [text["token_ids_sha256"]]
    # an image of an earlier version, with the prompts of all, stays; one of other words does not
    for said, prompt, drawn in ((samples.settings, "two dogs", 0), (settings, "a cat", 1)):
        words = text | {"settings": json.dumps(said, sort_keys=True), "prompt": prompt}
        save_picture(Image.fromarray(samples.image(4)), path, words)
        assert draw(pipeline, folder, request).count == drawn
    assert read(folder).rows == samples.rows


@pytest.mark.slow
def test_only_missing_and_damaged_images_are_drawn(tmp_path):
    pipeline, folder = tiny_pipeline(), tmp_path / "a"
    samples, _ = filled(pipeline, folder)
    before, untouched = everything(samples), (folder / file_name(0)).stat().st_mtime_ns
    (folder / file_name(1)).unlink()
    # in the text, in the pixels, and one of a version that kept no token ids
    (folder / file_name(2)).write_bytes((folder / file_name(2)).read_bytes()[:40])
    (folder / file_name(3)).write_bytes((folder / file_name(3)).read_bytes()[:-20])
    Image.fromarray(samples.image(4)).save(folder / file_name(4))
    (folder / ".000001.png.x.partial").write_bytes(b"half")
    assert filled(pipeline, folder)[1] == 4
    same(before, everything(read(folder)))
    assert (folder / file_name(0)).stat().st_mtime_ns == untouched
    assert filled(pipeline, folder)[1] == 0
    larger, drawn = filled(pipeline, folder, NUM + 3)
    assert drawn == 3 and len(larger) == NUM + 3
    same(before, everything(read(folder, NUM)))
    assert filled(pipeline, folder, 5)[1] == 0 and len(read(folder)) == NUM + 3


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 4], ids=["new", "growing"])
def test_a_killed_process_goes_on(tmp_path, before):
    """A real process, killed in the middle: what was there stays readable, what it left is used, nothing done twice."""
    folder, command = tmp_path / "killed", [sys.executable, "-m", "tests.tiny_samples"]
    if before:
        filled(tiny_pipeline(), folder, before)
    process = subprocess.Popen(
        [*command, str(folder)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "three images"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if before:
        assert len(read(folder)) == before
    with pytest.raises(UserError, match="no finished samples|lacks 4"):
        read(folder, NUM)
    left = sorted(folder.glob("0*.png"))
    stamps = [path.stat().st_mtime_ns for path in left]
    samples, drawn = filled(tiny_pipeline(), folder)
    assert drawn == NUM - len(left) == NUM - before - 3
    assert [path.stat().st_mtime_ns for path in left] == stamps
    whole, _ = filled(tiny_pipeline(), tmp_path / "whole")
    assert samples.rows == whole.rows
    same(everything(samples), everything(whole))


def test_what_a_folder_holds_else_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    filled(pipeline, tmp_path / "a", 2)
    for given, said in (
        ({"seed": SEED + 1}, "seed"),
        ({"options": {"top_k": 3}}, "sampling"),
        ({"dtype": "x"}, "dtype"),
    ):
        with pytest.raises(UserError, match=f"other settings .{said} differ"):
            check_folder(tmp_path / "a", tiny_request(pipeline, 2, **given))
    # whatever else lies beside samples stays
    (tmp_path / "a" / "thesis.txt").write_text("x")
    request = tiny_request(pipeline, 2)
    check_folder(tmp_path / "a", request)
    for name, file, said in (
        ("mine", "thesis.txt", "folder of samples"),
        ("old", "chunk_00000.npz", "an earlier version"),
        ("broken", MANIFEST, "cannot be read"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{")
        with pytest.raises(UserError, match=said):
            draw(pipeline, tmp_path / name, request)
    with pytest.raises(UserError, match="the file"):
        check_folder(tmp_path / "mine" / "thesis.txt", request)
    with claimed(tmp_path / "a"), pytest.raises(UserError, match="one process works in a folder at a time"):
        in_a_thread(lambda: draw(pipeline, tmp_path / "a", request))


def test_what_stops_the_first_batch_leaves_nothing_behind(tmp_path):
    pipeline = tiny_pipeline()
    request = tiny_request(pipeline)
    with pytest.raises(UserError, match="one that is full"):
        draw(pipeline, tmp_path / "a", replace(request, method="inpaint", inputs=PICTURES))
    assert not (tmp_path / "a").exists()


def in_a_thread(work):
    """What another process would meet: claims of one thread nest."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


PICTURES = (Image.new("RGB", (8, 8)), Image.new("L", (8, 8), 255))


def test_what_a_model_does_not_take_is_refused():
    for pipeline, given, said in (
        (tiny_pipeline(), {"steering": {"solver": "euler"}}, "no solver"),
        (tiny_pipeline(), {"decoding": {"int8": True}}, "no int8"),
        (tiny_pipeline(), {"options": {"top_k": 0}}, "top_k"),
        (tiny_dar(), {"steering": {"num_inference_steps": 0}}, "num_inference_steps"),
    ):
        with pytest.raises(UserError, match=said):
            tiny_request(pipeline, **given)


def test_unlabelled_models(tmp_path):
    samples, _ = filled(tiny_pipeline(num_classes=0), tmp_path / "a")
    assert set(samples.labels) == {0} and {row["label"] for row in samples.rows} == {"null"}
