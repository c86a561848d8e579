import json

import pytest

from isthmus.cli.train import own_options
from isthmus.next_scale.runs import prior_preset, tokenizer_preset
from isthmus.training.config import run_from_json, run_to_json

pytestmark = pytest.mark.slow


def resolved(result):
    assert result.code == 0, result.err
    return json.loads(result.out[: result.out.index("\n}\n") + 3])


def test_a_dry_run_shows_run_size_and_cost(isthmus, tmp_path):
    words = (
        "--preset",
        "small-32",
        "--out",
        tmp_path / "run",
        "--optim.learning-rate",
        "1e-3",
        "--classes",
        "face,flag",
    )
    result = isthmus("train", "tokenizer", *words, "--dry-run")
    run = resolved(result)
    assert run["optim"]["learning_rate"] == 1e-3 and run["classes"] == ["face", "flag"] and run["preset"] == "small-32"
    preset = run_to_json(tokenizer_preset("small-32"))
    changed = {name for name in run if run[name] != preset[name]}
    assert changed == {"out", "optim", "classes"}
    assert "0.95M" in result.out and "GFLOP per image" in result.out and "GiB" in result.out
    assert not (tmp_path / "run").exists()


def test_a_record_repeats_a_run_and_options_override_it(isthmus, refused, tmp_path):
    run = run_to_json(tokenizer_preset("small-32")) | {"seed": 9}
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"kind": "TokenizerRun", "run": run}))
    again = resolved(isthmus("train", "tokenizer", "--config", record, "--num-steps", 500, "--dry-run"))
    assert again == run | {"num_steps": 500}
    assert "not the record of a PriorRun" in refused("train", "prior", "--config", record)
    assert "got both" in refused("train", "tokenizer", "--config", record, "--preset", "small-32")
    record.write_text(json.dumps({"kind": "TokenizerRun", "run": run | {"wishes": 1}}))
    assert "wishes" in refused("train", "tokenizer", "--config", record, "--dry-run")


def test_short_forms_are_spelt_out():
    words, config, dry = own_options(["--from", "m", "--scale-attention=causal", "--config=run.json", "--dry-run"])
    assert (words, config, dry) == (["--from-model", "m", "--model.scale-attention=causal"], "run.json", True)


def test_a_prior_on_a_saved_tokenizer(isthmus, refused, model, tmp_path):
    words = ("train", "prior", "--tokenizer", model, "--data", "photos", "--out", tmp_path / "run", "--dry-run")
    result = isthmus(*words, "--scale-attention", "causal", "--model.width", 64, "--model.num-heads", 2)
    assert resolved(result)["model"]["scale_attention"] == "causal"
    assert "causal, scales 1, 2, 4, 21 tokens; " in result.out and "10 classes" in result.out
    assert "tokenizer" in refused("train", "prior", "--out", tmp_path / "run", "--dry-run")
    assert "does not exist" in refused("train", "prior", "--tokenizer", tmp_path / "no", "--dry-run")


def test_fine_tuning_starts_from_the_saved_network(isthmus, model, tmp_path):
    words = ("train", "prior", "--from", model, "--data", "photos", "--out", tmp_path / "run", "--dry-run")
    result = isthmus(*words)
    run = resolved(result)
    assert run["preset"] == "finetune-prior" and run["from_model"] == str(model)
    assert run_from_json(type(prior_preset("finetune-prior")), run).optim == prior_preset("finetune-prior").optim
    assert "0.01M" in result.out


@pytest.mark.parametrize("option", ["--optim.learning-rate=-1", "--seed=-1", "--num-steps 0", "--model.width x"])
def test_values_out_of_range_are_refused_before_anything_is_written(refused, model, tmp_path, option):
    refused("train", "prior", "--tokenizer", model, "--out", tmp_path / "run", *option.split())
    assert not (tmp_path / "run").exists()


def test_a_relative_path_of_a_record_says_where_it_comes_from(refused, tmp_path, monkeypatch):
    run = run_to_json(tokenizer_preset("small-32")) | {"data": "folder:pictures", "out": str(tmp_path / "new")}
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"kind": "TokenizerRun", "run": run}))
    monkeypatch.chdir(tmp_path)
    line = refused("train", "tokenizer", "--config", record, "--num-workers", 0)
    assert f"data folder:pictures comes from {record}" in line and f"looked up from {tmp_path}" in line
    assert "comes from" not in refused("train", "tokenizer", "--config", record, "--data", "folder:others")
