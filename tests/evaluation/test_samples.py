"""Samples are a pure function of (model, seed, options, index): no kill, batch size or process changes them."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import UserError
from isthmus.evaluation import samples
from isthmus.evaluation.classes import class_balanced_labels, own_frequency_labels
from isthmus.evaluation.drawing import draw_chunks
from isthmus.evaluation.held_out import stage_lengths
from isthmus.evaluation.samples import ChunkStore
from isthmus.pipelines.request import token_hashes
from isthmus.processes import Processes
from tests.evaluation.tiny_evaluation import NUM, REPOSITORY, SEED, mean_colour, store, tiny_model
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # not a mock: the constant alone is smaller, so that a few images fill several chunks
    monkeypatch.setattr(samples, "CHUNK", 4)
    monkeypatch.setattr("isthmus.evaluation.drawing.CHUNK", 4)


def draw(pipeline, folder, num=NUM, *, batch_size=3, processes=Processes(), settings=None):  # noqa: B008
    chunks = ChunkStore(folder, settings or {"seed": SEED})
    labels = class_balanced_labels(num, pipeline.num_classes)
    drawn = draw_chunks(
        pipeline,
        chunks,
        labels,
        seed=SEED,
        request={},
        network=mean_colour(),
        batch_size=batch_size,
        processes=processes,
    )
    return chunks, drawn


def everything(chunks, num=NUM):
    parts = list(chunks.read(num))
    arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("images", "labels", "token_ids")}
    return arrays | chunks.features(num)


def same(first, second):
    for name, value in first.items():
        tolerance = 1 if name == "images" else 1e-4 * 255 if name not in ("labels", "token_ids") else 0
        assert np.allclose(value.astype(float), second[name].astype(float), rtol=0, atol=tolerance), name


@pytest.mark.parametrize("pipeline", [tiny_pipeline(), tiny_dar()], ids=["next-scale", "d-ar"])
def test_any_batch_size_and_any_number_of_processes(pipeline, tmp_path):
    whole, drawn = draw(pipeline, tmp_path / "whole", batch_size=64)
    assert drawn == NUM
    reference = everything(whole)
    assert reference["images"].shape == (NUM, pipeline.image_size, pipeline.image_size, 3)
    assert reference["token_ids"].shape[1] == sum(stage_lengths(pipeline).values())
    for size in (1, 3):
        same(reference, everything(draw(pipeline, tmp_path / f"by{size}", batch_size=size)[0]))
    shares = [draw(pipeline, tmp_path / "shared", processes=Processes(rank, 2)) for rank in (1, 0)]
    assert sum(drawn for _, drawn in shares) == NUM and all(drawn for _, drawn in shares)
    same(reference, everything(shares[0][0]))


def test_an_image_of_an_evaluation_is_the_image_of_a_call(tmp_path):
    pipeline = tiny_pipeline()
    chunks = list(draw(pipeline, tmp_path / "a")[0].read(NUM))
    again = pipeline(int(chunks[1].labels[2]), seed=SEED, image_index=6)
    assert token_hashes(again.token_ids) == token_hashes([torch.from_numpy(chunks[1].token_ids[2:3])])
    assert np.abs(np.asarray(again.images[0]).astype(int) - chunks[1].images[2]).max() <= 1


def test_only_missing_chunks_are_drawn(tmp_path):
    pipeline = tiny_pipeline()
    chunks, _ = draw(pipeline, tmp_path / "a")
    before = everything(chunks)
    chunks.path(1).unlink()
    chunks.path(2).write_bytes(chunks.path(2).read_bytes()[:200])
    (tmp_path / "a" / ".chunk_00001.npz.x.partial").write_bytes(b"half")
    assert chunks.missing(NUM) == [1, 2]
    with pytest.raises(UserError, match="missing"):
        chunks.read(NUM)
    assert draw(pipeline, tmp_path / "a")[1] == 4 + 2
    same(before, everything(chunks))
    assert draw(pipeline, tmp_path / "a")[1] == 0
    assert draw(pipeline, tmp_path / "a", NUM + 3)[1] == 5, "the last chunk was not full; its images are the same"
    same(before, everything(chunks))
    same({name: rows[:5] for name, rows in before.items()}, everything(chunks, 5))


def test_a_killed_process_goes_on(tmp_path):
    """A real process, killed after its first chunk: what it left is used, and nothing is drawn twice."""
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.evaluation.tiny_evaluation", str(folder)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "ISTHMUS_TEST_CHUNK": "4"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "first chunk"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    chunks = store(folder)
    left = chunks.missing(NUM)
    assert left and 0 not in left
    stamp = chunks.path(0).stat().st_mtime_ns
    draw(tiny_model(), folder, settings=chunks.settings)
    assert chunks.path(0).stat().st_mtime_ns == stamp and chunks.missing(NUM) == []
    same(everything(chunks), everything(draw(tiny_model(), tmp_path / "whole")[0]))


def test_other_settings_are_refused(tmp_path):
    draw(tiny_pipeline(), tmp_path / "a", settings={"seed": 0, "features": "lite0"})
    for settings, said in (({"seed": 1, "features": "lite0"}, "seed"), ({"seed": 0, "features": "x"}, "features")):
        with pytest.raises(UserError, match=said):
            ChunkStore(tmp_path / "a", settings)
    (tmp_path / "a" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="thesis.txt"):
        ChunkStore(tmp_path / "a", {"seed": 0, "features": "lite0"})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="the file"):
        ChunkStore(tmp_path / "file", {})


def test_unlabelled_models(tmp_path):
    chunks, _ = draw(tiny_pipeline(num_classes=0), tmp_path / "a")
    assert set(everything(chunks)["labels"]) == {0}


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(sum), st.integers(1, 200))
def test_labels_keep_the_frequencies_at_every_length(counts, num):
    labels = own_frequency_labels(200, counts)[:num]
    assert np.array_equal(labels, own_frequency_labels(num, counts))
    shares = np.array(counts) / sum(counts)
    assert np.abs(np.bincount(labels, minlength=len(counts)) - shares * num).max() < len(counts)


@given(st.integers(1, 100), st.integers(0, 7))
def test_balanced_labels_differ_by_one_at_most(num, num_classes):
    counts = np.bincount(class_balanced_labels(num, num_classes), minlength=max(num_classes, 1))
    assert counts.max() - counts.min() <= 1 and counts.sum() == num
