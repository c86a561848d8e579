"""`isthmus train` picks preset and family from the words, the record or the model, and says what a run would be."""

import json
from pathlib import Path

import pytest

from isthmus.cli.train import own_options
from isthmus.dar.runs import diffusion_tokenizer_preset, next_token_prior_preset
from isthmus.next_scale.runs import prior_preset, tokenizer_preset
from isthmus.training.config import run_from_json, run_to_json
from tests.training.tiny_runs import diffusion_tokenizer_run, next_token_prior_run, train, write_images

pytestmark = pytest.mark.slow


def resolved(result):
    assert result.code == 0, result.err
    return json.loads(result.out[: result.out.index("\n}\n") + 3])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("cli-dar") / "squares.npz")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, data) -> Path:
    return train(diffusion_tokenizer_run(data, tmp_path_factory.mktemp("cli-dar") / "tokenizer", num_steps=2))


@pytest.fixture(scope="module")
def prior(tmp_path_factory, data, tokenizer) -> Path:
    return train(next_token_prior_run(data, tmp_path_factory.mktemp("cli-dar") / "prior", tokenizer, num_steps=2))


def test_a_dry_run_shows_run_size_and_cost(isthmus, tmp_path):
    words = ["--preset", "small-32", "--out", tmp_path / "run", "--optim.learning-rate", "1e-3"]
    result = isthmus("train", "tokenizer", *words, "--classes", "face,flag", "--dry-run")
    run = resolved(result)
    assert run["optim"]["learning_rate"] == 1e-3 and run["classes"] == ["face", "flag"] and run["preset"] == "small-32"
    preset = run_to_json(tokenizer_preset("small-32"))
    assert {name for name in run if run[name] != preset[name]} == {"out", "optim", "classes"}
    assert "0.95M" in result.out and "GFLOP per image" in result.out and "GiB" in result.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_dar_tokenizer_shows_run_size_and_cost(isthmus, tmp_path):
    words = ("--preset", "dar-small-32", "--out", tmp_path / "run", "--loss.jump", "2", "--decoder.num-layers", "3")
    result = isthmus("train", "tokenizer", *words, "--dry-run")
    run, preset = resolved(result), run_to_json(diffusion_tokenizer_preset("dar-small-32"))
    assert {name for name in run if run[name] != preset[name]} == {"out", "loss", "decoder"}
    assert run["loss"]["jump"] == 2.0 and run["decoder"]["num_layers"] == 3
    assert "GFLOP per image" in result.out and "GiB" in result.out and "images of 32 px" in result.out
    # no memory is taken for the published sizes
    result = isthmus("train", "tokenizer", "--preset", "dar-tokenizer-v1", "--out", tmp_path / "run", "--dry-run")
    assert "parameters  300.10M" in result.out and not (tmp_path / "run").exists()


def test_a_record_repeats_a_run_and_options_override_it(isthmus, refused, tmp_path):
    run = run_to_json(tokenizer_preset("small-32")) | {"seed": 9}
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"kind": "TokenizerRun", "run": run}))
    again = resolved(isthmus("train", "tokenizer", "--config", record, "--num-steps", 500, "--dry-run"))
    assert again == run | {"num_steps": 500}
    assert "not the record of a PriorRun or a NextTokenPriorRun" in refused("train", "prior", "--config", record)
    assert "got both" in refused("train", "tokenizer", "--config", record, "--preset", "small-32")
    record.write_text(json.dumps({"kind": "TokenizerRun", "run": run | {"wishes": 1}}))
    assert "wishes" in refused("train", "tokenizer", "--config", record, "--dry-run")
    # the record says the family
    run = run_to_json(next_token_prior_preset("dar-b")) | {"tokenizer": "nowhere"}
    record.write_text(json.dumps({"kind": "NextTokenPriorRun", "run": run}))
    assert "nowhere" in refused("train", "prior", "--config", record, "--dry-run")


def test_short_forms_are_spelt_out():
    words, config, dry = own_options(["--from", "m", "--scale-attention=causal", "--config=run.json", "--dry-run"])
    assert (words, config, dry) == (["--from-model", "m", "--model.scale-attention=causal"], "run.json", True)


def test_a_prior_takes_the_family_of_its_tokenizer(isthmus, refused, model, tmp_path, data, tokenizer):
    out = ("--out", tmp_path / "run", "--dry-run")
    words = ("train", "prior", "--tokenizer", model, "--data", "photos", *out)
    assert resolved(isthmus(*words, "--model.width", 64, "--model.num-heads", 2))["preset"] == "srdd-small"
    result = isthmus(*words, "--scale-attention", "causal", "--model.width", 64, "--model.num-heads", 2)
    assert resolved(result)["preset"] == "var-small" and resolved(result)["model"]["scale_attention"] == "causal"
    assert "causal, scales 1, 2, 4, 21 tokens; " in result.out and "10 classes" in result.out
    result = isthmus("train", "prior", "--tokenizer", tokenizer, "--data", data, "--model.width", 48, *out)
    assert resolved(result)["preset"] == "dar-prior-small" and resolved(result)["model"]["width"] == 48
    assert "4 tokens of 16 codes; " in result.out and "2 classes" in result.out
    for preset in ("srdd-small", "dar-l"):
        assert "needs a tokenizer" in refused("train", "prior", "--preset", preset, *out)
    assert "does not exist" in refused("train", "prior", "--tokenizer", tmp_path / "no", *out)


def test_fine_tuning_takes_the_family_and_the_network_of_the_model(
    isthmus, refused, model, tmp_path, data, tokenizer, prior
):
    out = ("--out", tmp_path / "run", "--dry-run")
    result = isthmus("train", "prior", "--from", model, "--data", "photos", *out)
    run = resolved(result)
    assert run["preset"] == "finetune-prior" and run["from_model"] == str(model) and "0.01M" in result.out
    assert run_from_json(type(prior_preset("finetune-prior")), run).optim == prior_preset("finetune-prior").optim
    assert resolved(isthmus("train", "tokenizer", "--from", model, *out))["preset"] == "finetune-tokenizer"
    words = ("--data", data, *out)
    for start in (tokenizer, prior):
        assert resolved(isthmus("train", "tokenizer", "--from", start, *words))["preset"] == "finetune-dar-tokenizer"
    # what the run would refuse, its description refuses
    assert "model.width is" in refused("train", "tokenizer", "--from", tokenizer, "--model.width", 999, *words)
    assert "decoder.num_layers is" in refused("train", "tokenizer", "--from", prior, "--decoder.num-layers", 9, *words)
    result = isthmus("train", "prior", "--from", prior, *words)
    assert resolved(result)["preset"] == "finetune-dar-prior" and "2 layers of width 16" in result.out


def test_values_out_of_range_are_refused_before_anything_is_written(refused, model, tmp_path):
    for option in ("--optim.learning-rate=-1", "--seed=-1", "--num-steps 0", "--model.width x"):
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


def test_help_and_presets_are_those_of_both_families(isthmus, refused):
    result = isthmus("train", "tokenizer", "--preset", "dar-small-32", "--help")
    assert result.code == 0 and "--loss.readout" in result.out and "--decoder.patch-size" in result.out
    assert "--model.scale-sizes" in isthmus("train", "tokenizer", "--help").out
    assert "dar-small-32" in refused("train", "tokenizer", "--preset", "dar-smal-32")
    assert "dar-xl" in refused("train", "prior", "--preset", "dar-xll")
