import json

import pytest

from isthmus.cli.train import taught_by
from isthmus.next_scale.distillation import teaching
from isthmus.next_scale.runs import distill_preset
from tests.cli.test_train import resolved
from tests.pipelines.tiny import tiny_pipeline
from tests.training.tiny_runs import write_images
from tests.training.tiny_teacher import tiny_teacher

pytestmark = pytest.mark.slow


@pytest.fixture
def taught(tmp_path):
    """A saved model of the classes 0, 1 and 2 and a run.json that says so."""
    folder = tmp_path / "teacher"
    pipeline = tiny_pipeline(names=False, sampling_defaults={"guidance_scale": [1.0, 2.0, 3.0], "top_k": 8})
    pipeline.save_pretrained(folder)
    data = write_images(tmp_path / "squares.npz", count=9, num_classes=3)
    record = {"data": data, "classes": ["0", "1", "2"], "augment": {"flip": False}}
    (folder / "run.json").write_text(json.dumps({"kind": "PriorRun", "run": record}))
    return folder


def test_a_dry_run_takes_the_teachers_images_and_defaults(isthmus, taught, tmp_path):
    words = ("distill", taught, "--scale-sizes", "1,4", "--out", tmp_path / "run", "--dry-run")
    result = isthmus(*words)
    run = resolved(result)
    assert run["preset"] == "distill-small" and run["from_model"] == str(taught)
    assert run["classes"] == ["0", "1", "2"] and run["data"].startswith("npz:") and run["augment"]["flip"] is False
    assert run["sampling"]["guidance"] == "1,2,3" and run["sampling"]["top_k"] == 8
    assert "scales 1, 4, 17 tokens, 2 forwards" in result.out and "scales 1, 2, 4, 21 tokens, 3 forwards" in result.out
    assert not (tmp_path / "run").exists()
    assert resolved(isthmus(*words, "--sampling.guidance", 2, "--seed", 4))["sampling"]["guidance"] == "2"
    record = tmp_path / "again.json"
    record.write_text(json.dumps({"kind": "DistillRun", "run": run}))
    assert resolved(isthmus("distill", "--config", record, "--dry-run")) == run


def rows_of(result):
    """Name -> text of the listing below the settings."""
    listing = result.out[result.out.index("\n}\n") :].splitlines()
    return {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in listing if "  " in line}


@pytest.fixture(scope="module")
def four_scales(tmp_path_factory):
    """A causal teacher on scales 1, 2, 3, 4 with its images."""
    folder = tmp_path_factory.mktemp("causal") / "teacher"
    tiny_teacher("causal").save_pretrained(folder)
    record = {"data": write_images(folder.parent / "squares.npz"), "classes": ["0", "1"]}
    (folder / "run.json").write_text(json.dumps({"run": record}))
    return folder


def test_a_dry_run_counts_every_training(isthmus, four_scales, tmp_path):
    words = ("distill", four_scales, "--scale-sizes", "1,4", "--num-steps", 30, "--batch-size", 2, "--dry-run")
    rows = rows_of(isthmus(*words, "--out", tmp_path / "run"))
    assert rows["run"].startswith("30 steps of 2 images, 60 images")
    assert "teacher asked at 1 of 2 scales" in rows["run"]
    assert rows["baseline"].startswith("30 steps of 2 images, 60 images") and "--no-baseline" in rows["baseline"]
    assert "baseline" not in rows_of(isthmus(*words, "--no-baseline", "--out", tmp_path / "run"))

    # one scale at a time: each student teaches the next, and the one without a teacher takes as many steps as all
    rows = rows_of(isthmus(*words, "--progressive", "--scale-attention", "markov", "--out", tmp_path / "run"))
    assert "scales 1, 2, 4; teacher asked at 2 of 3 scales" in rows["stage 1/2"]  # of the causal 1, 2, 3, 4
    assert "scales 1, 4; teacher asked at 1 of 2 scales" in rows["stage 2/2"]  # of the Markov 1, 2, 4
    assert rows["baseline"].startswith("60 steps of 2 images, 120 images") and "run" not in rows


def test_a_dry_run_without_weight_says_that_no_teacher_is_asked(isthmus, four_scales, tmp_path):
    words = ("distill", four_scales, "--scale-sizes", "1,4", "--distillation-weight", 0, "--out", tmp_path, "--dry-run")
    rows = rows_of(isthmus(*words))
    assert rows["run"].endswith("no teacher is asked (distillation weight 0)") and "baseline" not in rows
    staged = rows_of(isthmus(*words, "--progressive"))
    assert all("no teacher is asked" in staged[f"stage {number}/2"] for number in (1, 2)) and "baseline" in staged


def test_what_is_asked_of_a_teacher():
    for mask, sizes, said in (
        ("markov", (1, 2, 3, 4), "at all scales"),
        ("causal", (1, 3, 4), "at 1 of 3 scales, rollouts at the others"),
        ("markov", (1, 3, 4), "at 2 of 3 scales, rollouts at the others"),
    ):
        teacher = {"scale_sizes": (1, 2, 3, 4), "scale_attention": mask}
        assert said in teaching(teacher, {"scale_sizes": sizes, "scale_attention": mask}, weight=1.0)


def test_the_student_without_a_teacher_can_be_added_with_one_option(isthmus, refused, taught, tmp_path):
    words = ("distill", taught, "--scale-sizes", "1,4", "--out", tmp_path / "run")
    run = resolved(isthmus(*words, "--no-baseline", "--dry-run"))
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"kind": "DistillRun", "run": run}))
    assert resolved(isthmus("distill", "--config", record, "--baseline", "--dry-run")) == run | {"baseline": True}
    assert "--baseline is the default here" in refused(*words, "--baseline", "--dry-run")


def test_what_cannot_be_is_one_line_and_leaves_nothing(refused, taught, model, tmp_path):
    out = tmp_path / "run"
    assert "Nearest: 1,2,4" in refused("distill", taught, "--scale-sizes", "1,3,4", "--out", out)
    assert "no run.json" in refused("distill", model, "--scale-sizes", "1,4", "--out", out)
    words = ("distill", model, "--scale-sizes", "1,4", "--data", "photos", "--out", out)
    assert "classes of its teacher (face, flag, hand)" in refused(*words, "--dry-run")
    assert "did you mean" in refused("distill", taught, "--scale-size", "1,4", "--out", out).lower()
    assert "does not exist" in refused("distill", tmp_path / "no", "--scale-sizes", "1,4", "--out", out)
    words = ("distill", taught, "--scale-sizes", "1,4", "--report-images", 8, "--out", out)
    assert "--num of isthmus evaluate" in refused(*words)
    other = tmp_path / "dar"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "DARPipeline", "isthmus_format": 1}))
    assert "only next-scale models" in refused("distill", other, "--scale-sizes", "1,4", "--out", out)
    assert not out.exists()


def test_help_needs_no_model(isthmus):
    result = isthmus("distill", "--help")
    assert result.code == 0 and "--scale-sizes" in result.out and "--distillation-weight" in result.out


def test_guidance_is_written_as_on_the_command_line(tmp_path):
    for guidance, text in ((2.0, "2"), ({"kind": "linear", "start": 1.0, "end": 3.0}, "linear:1:3")):
        folder = tmp_path / text.partition(":")[0]
        tiny_pipeline(sampling_defaults={"guidance_scale": guidance}).save_pretrained(folder)
        run = taught_by(distill_preset("distill-small"), str(folder), own_data=True)
        assert run.sampling.guidance == text
