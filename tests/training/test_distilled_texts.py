"""Students of teachers that read texts: told what their teacher is told, by an encoder that stays the teacher's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from isthmus.errors import UserError
from isthmus.next_scale.distillation import BASELINE, ScaleDistillationTask, distill, student_of
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.pipelines.loading import load_pipeline
from isthmus.text.encoders import SmallTextEncoder
from isthmus.text.pretrained import PretrainedTextEncoder
from isthmus.text.tokenizer import learned_merges
from tests.made_once import made_once
from tests.testers import NO_DIVERGENCE
from tests.text.test_pretrained import write_network
from tests.training.tiny_runs import COLOURS, assert_same, killed_after, log_lines, weights
from tests.training.tiny_teacher import distill_run, tiny_teacher

pytestmark = pytest.mark.slow


def small_encoder() -> SmallTextEncoder:
    """Random weights that tell captions apart."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "max_length": 12, "sum_words": True}
        return SmallTextEncoder(merges=learned_merges(COLOURS, num_words=300), **sizes).eval()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A saved teacher of captions alone."""

    def write(folder: Path) -> Path:
        tiny_teacher(num_classes=0, text_encoder=small_encoder()).save_pretrained(folder / "teacher")
        return folder / "teacher"

    return made_once(tmp_path_factory, "text-teacher", write)


@pytest.fixture(scope="session")
def straight(tmp_path_factory, captioned, teacher) -> Path:
    """A finished distillation of it to scales 1, 3, 4."""
    return made_once(
        tmp_path_factory, "text-student", lambda folder: distill(distill_run(captioned, folder / "run", teacher))
    )


def assert_starts_as_its_teacher(out: Path) -> None:
    """Where the teacher is asked it agrees with the student of the first step: they were told the same."""
    first = log_lines(out)[0]
    asked = [value for name, value in first.items() if name.startswith("train/teacher_divergence")]
    assert asked and max(asked) < NO_DIVERGENCE


def test_a_student_of_texts_is_asked_in_words(straight, teacher):
    model, theirs = (load_pipeline(folder, device="cpu") for folder in (straight, teacher))
    assert isinstance(model, NextScalePipeline) and isinstance(model.text_encoder, SmallTextEncoder)
    assert model.schedule.sizes == (1, 3, 4) and model.num_classes == 0 and not model.class_names
    drawn = model(prompt=["a red square", "a green square"], seed=1)
    assert drawn.prompts == ["a red square", "a green square"] and len(drawn.images) == 2
    # the encoder is the teacher's, words included
    assert model.text_encoder.config == theirs.text_encoder.config
    assert_same(weights(straight / "text_encoder"), weights(teacher / "text_encoder"))
    assert_starts_as_its_teacher(straight)
    card = (straight / "README.md").read_text()
    assert "Reads prompts" in card and "the text encoder is the teacher's, frozen" in card
    assert model.config["data"]["prompt"] in COLOURS and model.config["data"]["prompt"] in card
    assert (straight / "previews" / "samples-00000004.png").is_file()
    assert len(json.loads((straight / "run.json").read_text())["text_encoder_fingerprint"]) == 64


def test_a_distillation_of_texts_goes_on_bit_for_bit(tmp_path, captioned, teacher, straight):
    run = killed_after(2, distill_run(captioned, straight, teacher), tmp_path / "run")
    distill(run)
    assert_same(weights(run.out), weights(straight))
    assert log_lines(run.out) == log_lines(straight)


def test_what_is_dropped_is_told_to_nobody(tmp_path, captioned, teacher):
    """With every caption dropped it makes no difference what they say, which otherwise it does."""
    arrays = dict(np.load(captioned.removeprefix("npz:")))
    np.savez(tmp_path / "swapped.npz", **arrays | {"captions": arrays["captions"][::-1]})
    learned = []
    for drop in (1.0, 0.0):
        for number, data in enumerate((captioned, f"npz:{tmp_path / 'swapped.npz'}")):
            run = distill_run(data, tmp_path / f"{drop}-{number}", teacher, label_dropout=drop, num_steps=2)
            learned.append(weights(distill(run) / "transformer"))
    assert_same(*learned[:2])
    assert any(not torch.equal(value, learned[3][name]) for name, value in learned[2].items())


def test_classes_and_texts_together(tmp_path, captioned):
    """Under the causal mask most scales are rollouts, which the teacher draws for the caption."""
    tiny_teacher("causal", text_encoder=small_encoder()).save_pretrained(tmp_path / "teacher")
    run = distill_run(captioned, tmp_path / "run", tmp_path / "teacher", num_steps=2, baseline=True)
    model = load_pipeline(distill(run), device="cpu")
    assert model.num_classes == 2 and len(model(["0", "1"], prompt="a red square", seed=0).images) == 2
    assert_starts_as_its_teacher(run.out)
    # the student without a teacher reads with the same encoder
    beside = run.out / BASELINE
    assert_same(weights(beside / "text_encoder"), weights(tmp_path / "teacher" / "text_encoder"))
    assert not torch.equal(*(weights(one / "transformer")["head.weight"] for one in (run.out, beside)))


def test_a_frozen_encoder_and_another_mask(tmp_path, captioned):
    encoder = PretrainedTextEncoder.from_folders(write_network("bert", tmp_path / "bert"))
    tiny_teacher("causal", num_classes=0, text_encoder=encoder).save_pretrained(tmp_path / "teacher")
    run = distill_run(
        captioned, tmp_path / "run", tmp_path / "teacher", num_steps=2, scale_sizes=None, scale_attention="markov"
    )
    model = load_pipeline(distill(run), device="cpu")
    assert_same(dict(model.text_encoder.state_dict()), dict(encoder.state_dict()))
    assert model.transformer.is_markov
    assert log_lines(run.out)[0]["train/teacher_divergence_scale0"] < NO_DIVERGENCE


def test_scale_by_scale_every_student_has_the_encoder(tmp_path, captioned, teacher):
    run = distill_run(captioned, tmp_path / "run", teacher, scale_sizes=(1, 4), num_steps=2, progressive=True)
    distill(run)
    for folder in (run.out / "stages" / "1-2-4", run.out):
        assert_same(weights(folder / "text_encoder"), weights(teacher / "text_encoder"))
        assert_starts_as_its_teacher(folder)


def test_a_teacher_with_rotary_positions_has_no_table_of_them():
    sizes = {"codebook_size": 8, "codebook_dim": 4, "width": 16, "num_layers": 1, "num_heads": 2, "num_classes": 0}
    teacher = NextScaleTransformer(
        scale_sizes=(1, 2, 4), text_pooled_width=6, text_width=5, norm="rms_sandwich", l2_attention=False,
        position="rope2d", size_condition=True, **sizes,
    )  # fmt: skip
    student = student_of(teacher, (1, 4), "markov")
    own = {"scale_embedding.weight"}
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in set(ours) - own)


def test_a_dry_run_says_what_reads_the_captions(tmp_path, captioned, teacher):
    said = ScaleDistillationTask.describe(distill_run(captioned, tmp_path / "run", teacher))
    assert "captions of 2 kinds" in said and "a frozen encoder of 0.0" in said


def test_what_cannot_be_read_is_refused_before_training(tmp_path, images, captioned, teacher):
    mute = tmp_path / "mute"
    load_pipeline(teacher, device="cpu").save_pretrained(mute, text_encoder=False)
    run = distill_run(images, tmp_path / "run", teacher)
    for changed, message in (
        (run, "images with captions"),
        (replace(run, data=captioned, from_model=str(mute)), "saved without its encoder"),
    ):
        for refuse in (distill, ScaleDistillationTask.describe):
            with pytest.raises(UserError, match=message):
                refuse(changed)
    assert not run.out.exists()
