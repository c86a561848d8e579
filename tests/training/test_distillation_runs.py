"""Whole distillations: an interrupted one equals a straight one, and what cannot be taught is refused before."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isthmus import load_pipeline
from isthmus.cli import main
from isthmus.cli.evaluate import Evaluate
from isthmus.cli.options import parse
from isthmus.errors import UserError
from isthmus.next_scale.distillation import (
    BASELINE,
    ScaleDistillationTask,
    baseline_run,
    distill,
    measuring_commands,
    stage_runs,
)
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.runs import DistillRun, PriorModel
from isthmus.next_scale.train_prior import with_new_classes
from isthmus.pipelines.options import parse_guidance
from isthmus.training.config import PriorSampling, run_from_json, run_to_json
from isthmus.training.train_prior import train_prior
from tests.made_once import made_once
from tests.testers import LOGGED, NO_DIVERGENCE
from tests.training.tiny_runs import assert_same, killed_after, log_lines, prior_run, weights, write_images
from tests.training.tiny_teacher import distill_run, tiny_teacher

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "teacher", lambda folder: saved(tiny_teacher(), folder / "markov"))


@pytest.fixture(scope="session")
def causal_teacher(tmp_path_factory) -> Path:
    return made_once(
        tmp_path_factory, "causal-teacher", lambda folder: saved(tiny_teacher("causal"), folder / "causal")
    )


def saved(pipeline: NextScalePipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def straight(tmp_path_factory, images, teacher) -> Path:
    """A finished distillation to scales 1, 3, 4."""
    return made_once(
        tmp_path_factory, "straight-student", lambda folder: distill(distill_run(images, folder / "run", teacher))
    )


def test_a_student_is_a_pipeline_on_the_shorter_schedule(straight, teacher):
    pipe = load_pipeline(straight, device="cpu")
    assert pipe.schedule.sizes == (1, 3, 4)
    parent = load_pipeline(teacher, device="cpu")
    # phi by the parent's side, not by the rule for three scales
    by_side = dict(zip(parent.schedule.sizes, parent.schedule.phi_indices, strict=True))
    assert pipe.schedule.phi_indices == tuple(by_side[side] for side in (1, 3, 4))
    assert [ids.shape for ids in pipe(["0", "1"], seed=0).token_ids] == [(2, 1), (2, 9), (2, 16)]
    lines = log_lines(straight)
    # 3 follows 1: rollouts; 1 and 4 have the teacher's own predecessor
    taught = {name for name in lines[0] if name.startswith("train/teacher")}
    assert taught == {
        "train/teacher_divergence_scale0",
        "train/teacher_rollout_scale1",
        "train/teacher_divergence_scale2",
    }
    assert all(lines[0][f"train/teacher_divergence_scale{k}"] < NO_DIVERGENCE for k in (0, 2))
    record = json.loads((straight / "run.json").read_text())
    assert record["kind"] == "DistillRun" and len(record["teacher_fingerprint"]) == 64
    run = run_from_json(DistillRun, record["run"])
    assert run_to_json(run) == record["run"] and run.scale_sizes == (1, 3, 4)


def test_a_distillation_goes_on_bit_for_bit(tmp_path, images, teacher, straight):
    run = killed_after(2, distill_run(images, straight, teacher), tmp_path / "run")
    distill(run)
    assert_same(weights(run.out / "transformer"), weights(straight / "transformer"))
    assert log_lines(run.out) == log_lines(straight)


def test_a_finished_one_only_exports_and_the_student_without_a_teacher_can_follow(tmp_path, images, teacher, straight):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    distill(distill_run(images, out, teacher, baseline=True))
    assert_same(weights(out / "transformer"), weights(straight / "transformer"))
    assert log_lines(out) == log_lines(straight)
    assert len(log_lines(out / BASELINE)) == len(log_lines(straight))


def words_of(command: str) -> list[str]:
    program, *words = shlex.split(command)
    assert program == "isthmus"
    return words


def test_the_commands_at_the_end_measure_and_compare_the_models(tmp_path, teacher, capsys, caplog):
    data = write_images(tmp_path / "images.npz", count=80)  # so that eight are held out
    with caplog.at_level("INFO", logger="isthmus"):
        distill(run := distill_run(data, tmp_path / "a run", teacher, num_steps=2))
    commands = measuring_commands(run, with_baseline=False)
    assert "\n".join(f"  {command}" for command in commands) in caplog.text
    for command in commands[:-1]:
        assert main(["-q", *words_of(command), "--num", "4"]) == 0
    capsys.readouterr()
    assert main(words_of(commands[-1])) == 0
    table = capsys.readouterr().out
    assert "nats per image" in table and "FD-lite0-192" in table


def test_the_commands_name_data_classes_and_every_model(tmp_path):
    run = distill_run("hf:some/set", tmp_path / "run", Path("teacher"), classes=("tench, Tinca tinca", "a b"),
                      image_column="picture", label_column="kind")  # fmt: skip
    *evaluations, compared = (words_of(command) for command in measuring_commands(run, with_baseline=True))
    scores = [str(tmp_path / "run" / "scores" / name) for name in ("teacher", "student", BASELINE)]
    assert [words[:2] for words in evaluations] == [
        ["evaluate", model] for model in ("teacher", str(run.out), str(run.out / BASELINE))
    ]
    assert compared == ["compare", *scores]
    for words, place in zip(evaluations, scores, strict=True):
        command = parse(Evaluate, words[1:], prog="isthmus evaluate")
        assert command.classes == run.classes and command.data == run.data and str(command.out) == place
        assert (command.image_column, command.label_column) == ("picture", "kind")


def test_guidance_by_scale_follows_every_stage(tmp_path, images):
    tiny_teacher(sizes=(1, 2, 3, 4, 6)).save_pretrained(tmp_path / "teacher")
    run = distill_run(
        images, tmp_path / "run", tmp_path / "teacher", scale_sizes=(1, 6), progressive=True,
        sampling=PriorSampling(guidance="1,2,3,4,5"),
    )  # fmt: skip
    stages = stage_runs(run)
    assert [stage.scale_sizes for stage in stages] == [(1, 2, 3, 6), (1, 2, 6), (1, 6)]
    values = [parse_guidance(stage.sampling.guidance) for stage in stages]
    assert values == [(1, 2, 3, 4, 5), (1, 2, 3, 5), (1, 2, 3, 4, 5)]


def test_it_does_not_go_on_with_another_teacher(tmp_path, images, teacher):
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    run = distill_run(images, tmp_path / "run", own, num_steps=2)
    train_prior(run)
    pipe = load_pipeline(own, device="cpu")
    with torch.no_grad():
        pipe.transformer.head.bias.add_(1)
    pipe.save_pretrained(own)
    with pytest.raises(UserError, match="teacher_fingerprint"):
        train_prior(run)


def test_scale_by_scale_and_beside_it_without_a_teacher(tmp_path, images, teacher):
    run = distill_run(
        images, tmp_path / "run", teacher, scale_sizes=(1, 4), num_steps=2, progressive=True, baseline=True,
        sampling=PriorSampling(guidance="1,2,3,4"),
    )  # fmt: skip
    first, last = stage_runs(run)
    assert first.scale_sizes == (1, 2, 4) and last is run
    folder = distill(run)
    assert load_pipeline(first.out, device="cpu").schedule.sizes == (1, 2, 4)
    # the second student starts as the first one ends
    task = ScaleDistillationTask(run)
    assert task.teacher.schedule.sizes == (1, 2, 4)
    # values by scale count on the scales of the model that is distilled, on every stage
    assert load_pipeline(first.out, device="cpu").defaults.guidance_scale == (1, 2, 4)
    assert load_pipeline(run.out, device="cpu").defaults.guidance_scale == (1, 4)
    assert_same(task.teacher.state_dict(), weights(first.out / "transformer"))
    record = json.loads((folder / BASELINE / "run.json").read_text())["run"]
    assert (record["distillation_weight"], record["num_steps"]) == (0.0, 4)
    for model in (folder, folder / BASELINE):
        drawn = load_pipeline(model, device="cpu")(["0"], seed=0)
        assert (sum(map(torch.numel, drawn.token_ids)), drawn.num_forwards) == (17, 2)
    # the same command again
    before = weights(folder / "transformer")
    distill(run)
    assert_same(weights(folder / "transformer"), before)


def test_a_markov_student_of_a_causal_teacher(tmp_path, images, causal_teacher):
    run = distill_run(images, tmp_path / "run", causal_teacher, scale_sizes=None, scale_attention="markov")
    task = ScaleDistillationTask(run)
    assert task.asked == (0, 1, 2, 3) and task.rolled == () and task.network.is_markov
    # the images' tokens under one schedule are all that is cached
    assert task.encoder is task.tokenizer
    distill(run)
    assert load_pipeline(run.out, device="cpu").transformer.is_markov
    assert log_lines(run.out)[0]["train/teacher_divergence_scale0"] < NO_DIVERGENCE


def test_a_causal_teacher_draws_behind_its_own_scales(tmp_path, images, causal_teacher):
    run = distill_run(images, tmp_path / "run", causal_teacher)
    task = ScaleDistillationTask(run)
    assert task.asked == (0,) and task.rolled == (1, 2)
    distill(run)
    assert load_pipeline(run.out, device="cpu").schedule.sizes == (1, 3, 4)


def test_the_student_without_a_teacher_is_trained_unless_it_is_left_out(tmp_path, images, teacher):
    run = distill_run(images, tmp_path / "run", teacher, baseline=True)
    assert DistillRun().baseline and baseline_run(replace(run, baseline=False), 1) is None
    compared = baseline_run(run, 2)
    assert compared is not None and (compared.num_steps, compared.distillation_weight) == (8, 0.0)
    assert not compared.baseline and compared.out == run.out / BASELINE
    # trained at once without a teacher, the student is that model; stage by stage it is not
    alone = replace(run, distillation_weight=0.0)
    assert baseline_run(alone, 1) is None and baseline_run(alone, 2) is not None


def test_without_weight_nobody_is_asked(images, teacher, tmp_path):
    run = distill_run(images, tmp_path / "run", teacher, distillation_weight=0.0)
    task = ScaleDistillationTask(run)
    assert task.asked == task.rolled == ()
    distill(run)
    line = log_lines(run.out)[0]
    assert not any("teacher" in name for name in line)
    mean = (line["train/bits_scale0"] + 9 * line["train/bits_scale1"] + 16 * line["train/bits_scale2"]) / 26
    assert line["train/bits_per_token"] == pytest.approx(mean, **LOGGED)


def test_the_mark_of_hidden_tokens_stays_the_teachers(tmp_path, images, teacher):
    """A teacher that was trained for refinement, so it has one weight that no step of a distillation reaches."""
    pipeline = load_pipeline(teacher, device="cpu")
    marked = with_new_classes(pipeline.transformer, 2, mask_embedding=True)
    with torch.no_grad():
        dict(marked.named_parameters())["mask_embedding"].fill_(0.5)
    type(pipeline)(pipeline.image_tokenizer, marked, class_names=["0", "1"]).save_pretrained(tmp_path / "teacher")
    run = distill_run(images, tmp_path / "run", tmp_path / "teacher", num_steps=2)
    distill(run)
    assert bool((weights(run.out / "transformer")["mask_embedding"] == 0.5).all())


def test_a_student_can_be_fine_tuned_like_any_model(tmp_path, images, straight):
    run = prior_run(images, tmp_path / "f", "", from_model=str(straight), model=PriorModel(), num_steps=2)
    train_prior(run)
    assert load_pipeline(run.out, device="cpu").schedule.sizes == (1, 3, 4)


def test_what_cannot_be_taught_is_refused_before_training(tmp_path, images, teacher):
    run = distill_run(images, tmp_path / "out", teacher)
    for changes, message in (
        ({"from_model": ""}, "needs a teacher"),
        ({"from_model": "nowhere/at-all"}, "nowhere/at-all"),
        ({"scale_sizes": (1, 5, 4)}, "Nearest: 1,4"),
        ({"scale_sizes": (2, 4)}, "Nearest: 1,2,4"),
        ({"scale_sizes": (1, 3)}, "Nearest: 1,3,4"),
        ({"scale_sizes": None}, "got the same"),
        ({"sampling": PriorSampling(guidance="1,2,3")}, "each of the teacher's scales"),
        ({"sampling": PriorSampling(guidance="1,2,3"), "progressive": True}, "each of the teacher's scales"),
        ({"sampling": PriorSampling(temperature=(1.0, 1.0, 0.1)), "progressive": True}, "temperature by scale needs"),
        ({"classes": ("0",)}, r"classes of its teacher \(0, 1\), got 0"),
        ({"classes": ("1", "0")}, "got 1, 0"),
        ({"data": "folder:nowhere"}, "nowhere"),
        ({"distillation_weight": -1.0}, "distillation_weight"),
        ({"tokenizer": "other"}, "brings its own tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            distill(replace(run, **changes))
    assert not run.out.exists()


def test_images_without_classes(tmp_path):
    pipeline = tiny_teacher()
    transformer = type(pipeline.transformer)(**{
        k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_") and k != "num_classes"
    }, num_classes=0)  # fmt: skip
    unlabelled = type(pipeline)(pipeline.image_tokenizer, transformer)
    unlabelled.save_pretrained(tmp_path / "teacher")
    data = write_images(tmp_path / "d.npz", num_classes=0)
    run = distill_run(data, tmp_path / "run", tmp_path / "teacher", num_steps=2)
    assert load_pipeline(distill(run), device="cpu").num_classes == 0
    assert not any("--classes" in command for command in measuring_commands(run, with_baseline=False))
