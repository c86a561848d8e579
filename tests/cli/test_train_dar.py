"""`isthmus train` picks the family from the preset, the record or the model, and describes D-AR runs."""

import json
from pathlib import Path

import pytest

from isthmus.dar.runs import diffusion_tokenizer_preset, next_token_prior_preset
from isthmus.training.config import run_to_json
from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.training.tiny_runs import diffusion_tokenizer_run, next_token_prior_run, write_images

pytestmark = pytest.mark.slow


def resolved(result):
    assert result.code == 0, result.err
    return json.loads(result.out[: result.out.index("\n}\n") + 3])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("cli-dar") / "squares.npz")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, data) -> Path:
    run = diffusion_tokenizer_run(data, tmp_path_factory.mktemp("cli-dar") / "tokenizer", num_steps=2)
    return train_tokenizer(run)


@pytest.fixture(scope="module")
def prior(tmp_path_factory, data, tokenizer) -> Path:
    run = next_token_prior_run(data, tmp_path_factory.mktemp("cli-dar") / "prior", tokenizer, num_steps=2)
    return train_prior(run)


def test_a_dry_run_of_a_tokenizer_shows_run_size_and_cost(isthmus, tmp_path):
    words = ("--preset", "dar-small-32", "--out", tmp_path / "run", "--loss.jump", "2", "--decoder.num-layers", "3")
    result = isthmus("train", "tokenizer", *words, "--dry-run")
    run, preset = resolved(result), run_to_json(diffusion_tokenizer_preset("dar-small-32"))
    assert {name for name in run if run[name] != preset[name]} == {"out", "loss", "decoder"}
    assert run["loss"]["jump"] == 2.0 and run["decoder"]["num_layers"] == 3
    assert "GFLOP per image" in result.out and "GiB" in result.out and "images of 32 px" in result.out
    assert not (tmp_path / "run").exists()


def test_the_published_sizes_are_described_without_their_memory(isthmus, tmp_path):
    result = isthmus("train", "tokenizer", "--preset", "dar-tokenizer-v1", "--out", tmp_path / "run", "--dry-run")
    assert "parameters  300.10M" in result.out


def test_a_dry_run_of_a_prior_on_a_saved_tokenizer(isthmus, refused, tmp_path, data, tokenizer):
    words = ("--tokenizer", tokenizer, "--data", data, "--out", tmp_path / "run", "--dry-run")
    result = isthmus("train", "prior", *words, "--model.width", 48)
    run = resolved(result)
    assert run["preset"] == "dar-prior-small" and run["model"]["width"] == 48
    assert "4 tokens of 16 codes; " in result.out and "2 classes" in result.out
    assert "tokenizer" in refused("train", "prior", "--preset", "dar-l", "--out", tmp_path / "run", "--dry-run")


def test_fine_tuning_takes_the_family_of_the_model(isthmus, refused, tmp_path, data, tokenizer, prior):
    words = ("--data", data, "--out", tmp_path / "run", "--dry-run")
    assert resolved(isthmus("train", "tokenizer", "--from", tokenizer, *words))["preset"] == "finetune-dar-tokenizer"
    assert resolved(isthmus("train", "tokenizer", "--from", prior, *words))["preset"] == "finetune-dar-tokenizer"
    # what the run would refuse, its description refuses
    assert "model.width is" in refused("train", "tokenizer", "--from", tokenizer, "--model.width", 999, *words)
    assert "decoder.num_layers is" in refused("train", "tokenizer", "--from", prior, "--decoder.num-layers", 9, *words)
    assert "model.width is 16" in refused("train", "prior", "--from", prior, "--model.width", 999, *words)
    result = isthmus("train", "prior", "--from", prior, *words)
    assert resolved(result)["preset"] == "finetune-dar-prior" and "2 layers of width 16" in result.out


def test_a_record_repeats_a_run_of_its_family(isthmus, refused, tmp_path):
    run = run_to_json(next_token_prior_preset("dar-b")) | {"seed": 9, "tokenizer": "nowhere"}
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"kind": "NextTokenPriorRun", "run": run}))
    assert "nowhere" in refused("train", "prior", "--config", record, "--dry-run")
    said = refused("train", "tokenizer", "--config", record)
    assert "not the record of a TokenizerRun or a DiffusionTokenizerRun" in said


def test_unknown_presets_name_the_nearest_of_both_families(refused):
    assert "dar-small-32" in refused("train", "tokenizer", "--preset", "dar-smal-32")
    assert "small-32" in refused("train", "tokenizer", "--preset", "smal-32")
    assert "dar-xl" in refused("train", "prior", "--preset", "dar-xll")


def test_help_shows_the_options_of_the_family_that_is_named(isthmus):
    result = isthmus("train", "tokenizer", "--preset", "dar-small-32", "--help")
    assert result.code == 0 and "--loss.readout" in result.out and "--decoder.patch-size" in result.out
    assert "--model.scale-sizes" in isthmus("train", "tokenizer", "--help").out
