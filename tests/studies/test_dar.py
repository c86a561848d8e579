"""The study of D-AR on tiny runs: a plan per budget, all tables, going on after a kill."""

import json
import shutil
from pathlib import Path

import pytest

from isthmus.studies.dar import DAR_STUDY
from isthmus.studies.experiments import RESULT
from isthmus.studies.options import DarStudyOptions
from isthmus.studies.srdd import SRDD_STUDY
from tests.studies import tiny_studies


def values(folder: Path, name: str):
    return json.loads((folder / name / RESULT).read_text())["values"]


def test_budgets_name_their_tables():
    quick, full = (DarStudyOptions(budget=budget) for budget in ("quick", "full"))
    assert full.tables_among(DAR_STUDY.table_names) == DAR_STUDY.table_names
    assert set(quick.bought.tables) < set(DAR_STUDY.table_names)
    assert quick.setting("cpu", 2).tokenizer.num_steps < full.setting("cpu", 2).tokenizer.num_steps
    plan = {experiment.name for experiment in DAR_STUDY.plan(quick.setting("cpu", 2), quick.bought.tables)}
    measured = {f"{name}-seed0" for name in ("reconstruction", "solvers", "guidance", "order")}
    assert {"tokenizer-seed0", "prior-seed0"} | measured == plan


@pytest.mark.slow
def test_all_tables_are_filled(finished_dar):
    text = (finished_dar / "report.md").read_text()
    assert "Not run" not in text
    for word in ("2 tokens", "4 tokens", "adams-bashforth, 4 steps", "linear:1.1:8", "tokens 3 to 4", "r-FD-lite0-192"):
        assert word in text
    assert {path.stem for path in finished_dar.glob("*.png")} == {"reconstruction", "previews", "solvers", "order"}


@pytest.mark.slow
def test_seeds_are_subtracted_from_each_other(finished_dar, data):
    tiny_studies.assert_seeds_are_subtracted(DAR_STUDY, tiny_studies.dar_setting(data), finished_dar)


@pytest.mark.slow
def test_the_last_preview_is_the_sample_that_the_evaluation_scores(finished_dar):
    """Previews and `isthmus evaluate` draw the same images of (seed, i), and measure them alike."""
    last = list(values(finished_dar, "previews-seed0")["by_step"].values())[-1]
    scored = values(finished_dar, "guidance-seed0")["by_guidance"]["2"]
    assert last.keys() == scored.keys()
    for name, score in last.items():
        assert score["value"] == pytest.approx(scored[name]["value"], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_all_tokens_rebuild_what_the_models_own_solver_rebuilds(finished_dar):
    """The last row by tokens is the row of the model's own solver and number of steps."""
    by_tokens = values(finished_dar, "reconstruction-seed0")["by_tokens"]
    solved = values(finished_dar, "solvers-seed0")
    own = tiny_studies.dar_setting("").tokenizer.flow
    assert own.num_inference_steps is None and own.solver is None
    name = solved["trained_steps"]
    assert name in solved["by_solver"], "the tiny study measures the model's own solver among others"
    last = list(by_tokens.values())[-1]
    # pixels 5e-5 from each other, and half the range from the images: 20 log10(1 + 1e-4) dB
    assert last["PSNR, dB"][0] == pytest.approx(solved["by_solver"][name]["PSNR, dB"][0], abs=1e-3)


def settings(study, kind: str, **changes):
    make = tiny_studies.dar_setting if study is DAR_STUDY else tiny_studies.srdd_setting
    return [one.settings for one in study.plan(make("", **changes), study.table_names) if one.kind == kind]


@pytest.mark.parametrize(
    ("change", "decided"),
    [
        ({"device": "cuda"}, [(DAR_STUDY, "solvers"), (SRDD_STUDY, "cost"), (SRDD_STUDY, "drawing")]),
        ({"threads": 2}, [(DAR_STUDY, "solvers"), (SRDD_STUDY, "cost"), (SRDD_STUDY, "drawing")]),
        ({"num": 9}, [(DAR_STUDY, "evaluation"), (DAR_STUDY, "previews"), (SRDD_STUDY, "evaluation"),
                      (SRDD_STUDY, "refined"), (SRDD_STUDY, "student-samples")]),
    ],
)  # fmt: skip
def test_results_of_another_device_or_number_of_threads_or_samples_are_not_taken_over(change, decided):
    for study, kind in decided:
        ours, theirs = settings(study, kind), settings(study, kind, **change)
        assert ours and all(a != b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_bits_of_groups_average_to_bits_of_all(finished_dar):
    found = values(finished_dar, "order-seed0")
    groups = [mean for mean, *_ in found["by_group"]]
    assert sum(groups) / len(groups) == pytest.approx(found["all"][0])
    assert sum(found["by_position"]) / len(found["by_position"]) == pytest.approx(found["all"][0])


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_numbers(dar_copy, data):
    before = {name: values(dar_copy, name) for name in ("tokenizer-seed0", "order-seed0", "previews-seed0")}
    for name in before:
        (dar_copy / name / RESULT).unlink()
    run = dar_copy / "tokenizer-seed0" / "run"
    shutil.rmtree(run / "checkpoints" / "checkpoint-00000006")
    tiny_studies.run(DAR_STUDY, tiny_studies.dar_setting(data), dar_copy)
    assert {name: values(dar_copy, name) for name in before} == before
