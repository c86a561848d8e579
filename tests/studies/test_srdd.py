"""The study of SRDD on tiny runs: a plan per budget, shared work once, going on after a kill."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from isthmus.data.batches import EvaluationImages
from isthmus.data.opening import open_source
from isthmus.errors import UserError
from isthmus.next_scale.train_tokenizer import load_tokenizer
from isthmus.studies.experiments import RESULT, finished
from isthmus.studies.measures import Lab
from isthmus.studies.options import SrddStudyOptions
from isthmus.studies.srdd import HOLES, SRDD_STUDY, holes, masks, psnr_inside
from isthmus.studies.srdd_priors import every_second
from isthmus.studies.tables import Found
from tests.studies import tiny_studies
from tests.training.tiny_runs import write_images


def values(folder: Path, name: str):
    return json.loads((folder / name / RESULT).read_text())["values"]


def test_budgets_name_their_tables():
    quick, full = SrddStudyOptions(), SrddStudyOptions(budget="full")
    assert full.tables_among(SRDD_STUDY.table_names) == SRDD_STUDY.table_names
    assert set(quick.bought.tables) < set(SRDD_STUDY.table_names)
    plan = {experiment.name for experiment in SRDD_STUDY.plan(quick.setting("cpu", 2), quick.bought.tables)}
    assert {"tokenizer", "prior-causal-seed0", "prior-markov-seed0", "sweep-markov-seed0", "snr"} <= plan
    assert not any("short" in name or "lognormal" in name or "seed1" in name for name in plan)


def test_compared_priors_differ_in_what_is_compared_alone(data):
    plan = SRDD_STUDY.plan(tiny_studies.srdd_setting(data), SRDD_STUDY.table_names)
    runs = {one.settings["variant"]: one.settings["run"] for one in plan if one.kind == "prior"}

    def differences(name: str) -> set[str]:
        ours, theirs = runs["markov"], runs[name]
        flat = [{**run, **{f"model.{k}": v for k, v in run["model"].items()}} for run in (ours, theirs)]
        return {key for key in flat[0] if flat[0][key] != flat[1][key]} - {"model"}

    assert differences("causal") == {"model.scale_attention"}
    assert differences("lognormal") == {"scale_loss"}
    assert differences("short") == set()


@pytest.mark.slow
def test_all_tables_are_filled(finished_srdd):
    text = (finished_srdd / "report.md").read_text()
    assert "Not run" not in text and "not measured" not in text
    for word in ("causal", "markov", "linear:1:2.5", "every second scale", "log-normal", "4 x 4", "FD-lite0-192"):
        assert word in text
    for word in ("centre hole, painted over", "random hole, causal drawn, 1 jump", "2x, bicubic", "4x, markov drawn"):
        assert f"| {word} |" in text
    assert "| cannot tell |" in text
    assert {path.stem for path in finished_srdd.glob("*.png")} == {"masks", "guidance", "weighting", "snr"}


@pytest.mark.slow
def test_seeds_are_subtracted_from_each_other(finished_srdd, data):
    setting, counted = tiny_studies.srdd_setting(data), ("MB", "SNR")  # and of the one tokenizer
    tiny_studies.assert_seeds_are_subtracted(SRDD_STUDY, setting, finished_srdd, not_by_seed=counted)


@pytest.mark.slow
def test_what_the_guards_say_of_samples_stands_in_the_report(finished_srdd):
    report = (finished_srdd / "report.md").read_text()
    for name in ("samples-markov-seed0", "refined-markov-seed0", "samples-student-taught-seed0"):
        said = values(finished_srdd, name)["warnings"]
        assert said and all(f"Warning: {one}" in report for one in said)


def test_samples_have_the_classes_of_the_data(tmp_path):
    for num_classes, balance in ((2, "data"), (0, "uniform")):
        images = write_images(tmp_path / f"{num_classes}.npz", count=80, num_classes=num_classes)
        assert Lab(tiny_studies.srdd_setting(images), tmp_path).balance == balance


@pytest.mark.slow
def test_rows_of_two_protocols_are_refused(finished_srdd, data):
    setting = tiny_studies.srdd_setting(data)
    results = finished(SRDD_STUDY.plan(setting, SRDD_STUDY.table_names), finished_srdd)
    changed = copy.deepcopy(results)
    changed["samples-causal-seed0"]["protocol"]["reference_sha256"] = "of other images"
    with pytest.raises(UserError, match="differ in reference sha256"):
        masks.make(Found(setting, changed))


@pytest.mark.slow
def test_refinement_is_compared_at_equal_numbers_of_forwards(finished_srdd):
    for variant in ("markov", "refining"):
        found = values(finished_srdd, f"refined-{variant}-seed0")
        assert found["forwards"] == {"none": 3, "simple": 5, "masked": 5}
    # unrefined draws are those of the evaluation: the same requests, scored in the same way
    refined, samples = (values(finished_srdd, f"{name}-markov-seed0") for name in ("refined", "samples"))
    own = samples["by_guidance"]["linear:1:2.5"]
    assert {name: score["value"] for name, score in refined["by_mode"]["none"].items()} == pytest.approx(
        {name: own[name]["value"] for name in refined["by_mode"]["none"]}
    )


@pytest.mark.slow
def test_students_differ_in_their_teacher_alone(finished_srdd):
    taught, untaught = (
        json.loads((finished_srdd / f"student-{kind}-seed0" / "run" / "run.json").read_text())["run"]
        for kind in ("taught", "untaught")
    )
    assert {name for name in taught if taught[name] != untaught[name]} == {"distillation_weight", "out"}
    assert taught["scale_sizes"] == [1, 4] and taught["from_model"].endswith("prior-markov-seed0/run")


def test_psnr_in_the_hole_by_hand():
    originals, made, mask = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[:, :, 0] = 1
    made[0, :, 0] = 0.2  # in the hole: 10 log10(2^2 / 0.2^2) = 20 dB
    made[1, :, 0, 0], made[1, :, 1:] = 0.4, 1.0  # a quarter of it by 0.4, the same mean square; outside does not count
    found = psnr_inside(made, originals, mask)
    assert found.tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


def test_holes_are_those_of_an_image_whatever_the_number():
    for kind in HOLES:
        found = holes(kind, 6, 16)
        assert torch.equal(found[:2], holes(kind, 2, 16)) and set(found.unique().tolist()) == {0.0, 1.0}
        assert all(0 < mask.mean() < 1 for mask in found)


@pytest.mark.slow
def test_the_token_cache_is_made_once_per_tokenizer_and_seed(finished_srdd):
    caches = sorted(path.name for path in (finished_srdd / "token-caches").iterdir())
    assert caches == ["tokenizer-seed0", "tokenizer-short-seed0"]
    assert not list(finished_srdd.glob("prior-*/run/tokens"))


@pytest.mark.slow
def test_the_shortened_tokenizer_has_the_same_weights_and_fewer_scales(finished_srdd):
    parent, short = (load_tokenizer(str(finished_srdd / name / "run")) for name in ("tokenizer", "tokenizer-short"))
    assert short.schedule == parent.schedule.derive(every_second(parent.schedule.sizes))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    expected = parent.requantize(parent.latents(images), short.schedule)
    assert all(torch.equal(a, b) for a, b in zip(short.encode(images).token_ids, expected, strict=True))


@pytest.mark.slow
def test_the_last_ratio_is_that_of_all_codes(finished_srdd, data):
    tokenizer = load_tokenizer(str(finished_srdd / "tokenizer" / "run"))
    held_out = EvaluationImages(open_source(data, image_size=8, split="val"), 8)
    images = torch.stack([torch.as_tensor(held_out[i]["image"]) for i in range(len(held_out))])
    output = tokenizer.encode(images)
    lost = output.latents - tokenizer.features_up_to(output.token_ids, 2)
    ratios = output.latents.flatten(1).norm(dim=1) / lost.flatten(1).norm(dim=1)
    found = values(finished_srdd, "snr")
    assert found["scale_sizes"] == [1, 2, 4] and found["images"] == len(images)
    assert found["decibels"][2][0] == pytest.approx(20 * ratios.log10().mean().item(), abs=1e-3)


@pytest.mark.slow
def test_a_markov_model_draws_with_less_memory_than_a_causal_one(finished_srdd):
    found = values(finished_srdd, "cost-causal-markov")
    assert found["markov"]["image_bytes"] < found["causal"]["image_bytes"]
    assert all(len(found[name][kind]) == 2 for name in found for kind in ("step_seconds", "image_seconds"))


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_numbers(srdd_copy, data):
    """The last result, half a training and what follows from it are missing."""
    before = {name: values(srdd_copy, name) for name in ("prior-markov-seed0", "samples-markov-seed0", "snr")}
    run = srdd_copy / "prior-markov-seed0" / "run"
    (srdd_copy / "prior-markov-seed0" / RESULT).unlink()
    (srdd_copy / "snr" / RESULT).unlink()
    shutil.rmtree(srdd_copy / "samples-markov-seed0")
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step:08d}")
    (run / "model_index.json").unlink()
    kept = srdd_copy / "prior-causal-seed0" / RESULT
    untouched = os.stat(kept).st_mtime_ns
    tiny_studies.run(SRDD_STUDY, tiny_studies.srdd_setting(data), srdd_copy)
    assert {name: values(srdd_copy, name) for name in before} == before
    assert os.stat(kept).st_mtime_ns == untouched
