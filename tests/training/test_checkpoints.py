"""Checkpoints are whole or not there, the newest few are kept, and a damaged one is named."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from isthmus.cli import main
from isthmus.errors import UserError
from isthmus.training.checkpoints import newest_checkpoint
from isthmus.training.config import run_to_json
from tests.training.tiny_runs import (
    OPTIM,
    assert_same,
    assert_same_log,
    killed_after,
    prior_run,
    tokenizer_run,
    train,
    weights,
)

FILES = ["model.safetensors", "optimizer.bin", "ema.safetensors", "extras.safetensors", "progress.json"]


def test_the_newest_complete_folder_counts(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    folder = tmp_path / "checkpoints"
    for name in ("checkpoint-00000009", "checkpoint-00000010", "checkpoint-00000011.partial", "checkpoint-x", "other"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoint-00000012").write_text("a file")
    assert newest_checkpoint(tmp_path) == folder / "checkpoint-00000010"


@pytest.mark.slow
def test_the_newest_few_are_kept(tmp_path, images, trained_tokenizer):
    run = prior_run(images, tmp_path / "run", trained_tokenizer, keep_checkpoints=2, save_every=1)
    # all that a run killed in its first second leaves
    run.out.mkdir()
    (run.out / "run.json.partial").write_text("{")
    train(run)
    assert sorted(path.name for path in (run.out / "checkpoints").iterdir()) == [
        "checkpoint-00000005",
        "checkpoint-00000006",
    ]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    tmp_path, capsys, images, trained_tokenizer, trained_prior
):
    run = killed_after(4, prior_run(images, trained_prior, trained_tokenizer), tmp_path / "run")
    newest = run.out / "checkpoints" / "checkpoint-00000004"
    record = tmp_path / "again.json"
    record.write_text(json.dumps(run_to_json(run)))
    words = ["--quiet", "train", "prior", "--config", str(record)]
    for name, keep in itertools.product(FILES, (0.0, 0.5)):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: int(keep * len(whole))])
        assert main(words) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and str(newest) in said and "Delete that folder" in said, name
        (newest / name).write_bytes(whole)
    # the advice
    shutil.rmtree(newest)
    assert main(words) == 0
    assert_same(weights(run.out / "transformer"), weights(trained_prior / "transformer"))


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(tmp_path, images, trained_tokenizer, trained_prior):
    run = killed_after(4, prior_run(images, trained_prior, trained_tokenizer), tmp_path / "run")
    newest = run.out / "checkpoints" / "checkpoint-00000004"
    for name in ("model.safetensors", "ema.safetensors", "optimizer.bin"):
        shutil.copy(trained_tokenizer / "checkpoints" / "checkpoint-00000004" / name, newest / name)
    with pytest.raises(UserError, match="checkpoint-00000004"):
        train(run)


def test_a_foreign_record_is_refused(tmp_path, images, trained_tokenizer):
    for text in ("", "[]", '{"kind": "PriorRun"}', '{"kind": "PriorRun", "run": 3}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match="not the record of a run"):
            train(prior_run(images, tmp_path, trained_tokenizer))


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(tmp_path, images, trained_tokenizer):
    """The second step's rate is beyond float32: its losses are finite, the weights it leaves are not."""
    optim = replace(OPTIM, learning_rate=1e42, warmup_start=1e-45, warmup_steps=2)
    run = prior_run(images, tmp_path / "run", trained_tokenizer, optim=optim, save_every=1)
    good = run.out / "checkpoints" / "checkpoint-00000001"
    with pytest.raises(UserError, match=f"must be finite.*the last good checkpoint is {good}"):
        train(run)
    assert newest_checkpoint(run.out) == good
    assert all(value.isfinite().all() for value in load_file(good / "model.safetensors").values())


@pytest.mark.slow
def test_every_part_of_a_batch_counts_and_makes_one_step(tmp_path, images):
    """Two networks take turns; each takes one step per batch, not one per part or none."""
    run = tokenizer_run(images, tmp_path / "run", accumulate=2)
    train(run)
    newest = newest_checkpoint(run.out)
    assert newest is not None
    start = round(run.loss.adversarial_start * run.num_steps)
    for name, steps in (("optimizer.bin", run.num_steps), ("optimizer_1.bin", run.num_steps - start)):
        state = torch.load(newest / name, weights_only=True)["state"]
        # the codebook joins after the continuous steps
        assert max(int(entry["step"]) for entry in state.values()) == steps, name


@pytest.mark.slow
def test_a_log_line_is_about_the_whole_batch(tmp_path, images, trained_tokenizer):
    whole = prior_run(images, tmp_path / "whole", trained_tokenizer, num_steps=2)
    parts = replace(whole, out=tmp_path / "parts", accumulate=4)
    for run in (whole, parts):
        train(run)
    assert_same_log(whole.out, parts.out)
