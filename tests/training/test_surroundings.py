"""Where a training runs must not matter: its thread, the caller's defaults, the seed's size, a second start."""

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus.errors import UserError
from isthmus.files import claimed
from tests.training.tiny_runs import (
    FAMILIES,
    OPTIM,
    Family,
    assert_same,
    diffusion_tokenizer_run,
    prior_run,
    tokenizer_run,
    train,
    weights,
)

pytestmark = pytest.mark.slow

BRIEF = {"num_steps": 2, "save_every": 2, "validate_every": 2, "preview_every": 2}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    """Of the two, in turn."""
    return FAMILIES[request.param]


def test_any_thread_and_any_seed_trains(tmp_path, images, family):
    run = family.tokenizer_run(images, tmp_path / "main", seed=2**70, **BRIEF)
    train(run)
    other = family.tokenizer_run(images, tmp_path / "thread", seed=2**70, **BRIEF)
    thread = threading.Thread(target=train, args=(other,))
    thread.start()
    thread.join()
    assert_same(weights(run.out), weights(other.out))


def test_changed_defaults_of_torch_are_refused(tmp_path, images):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(UserError, match="set_default_dtype"):
            train(tokenizer_run(images, tmp_path / "run", **BRIEF))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not (tmp_path / "run").exists()


def test_a_run_in_a_folder_where_another_is_at_work_is_refused(tmp_path, images):
    run = tokenizer_run(images, tmp_path / "run", **BRIEF)
    refused: list[UserError] = []

    def start_again() -> None:
        try:
            train(run)
        except UserError as error:
            refused.append(error)

    with claimed(run.out):
        thread = threading.Thread(target=start_again)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on" in str(refused[0])
        # the one that is at work goes on
        train(run)
    assert not (run.out / ".lock").exists()


def test_a_run_fills_an_empty_disk_at_the_end_of_a_link(tmp_path, images, monkeypatch):
    (tmp_path / "disk/lost+found").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "disk")
    assert train(diffusion_tokenizer_run(images, tmp_path / "link", **BRIEF)).exists()
    assert (tmp_path / "disk/run.json").is_file()
    # the folder that the shell stands in
    train(diffusion_tokenizer_run(images, Path("."), **BRIEF))


def test_a_finished_run_goes_on_as_if_it_had_been_asked_for_at_once(tmp_path, images, family, request):
    constant = {**BRIEF, "optim": replace(OPTIM, schedule="constant")}
    short = family.prior_run(images, tmp_path / "run", request.getfixturevalue(family.tokenizer), **constant)
    long = replace(short, num_steps=4)
    train(short), train(long)
    straight = replace(long, out=tmp_path / "straight")
    train(straight)
    assert_same(weights(long.out), weights(straight.out))

    # what is only about how a step is computed may change on the way, too
    parts = replace(long, num_steps=6, accumulate=2, checkpoint_activations=True, log_every=3, save_every=3)
    train(parts), train(replace(straight, num_steps=6))
    first, second = (weights(run.out / "transformer") for run in (parts, straight))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_whose_steps_depend_on_their_number_is_not_made_longer(tmp_path, images):
    run = tokenizer_run(images, tmp_path / "run", **BRIEF)
    train(run)
    with pytest.raises(UserError, match=f"optim.schedule linear.*--from {run.out}"):
        train(replace(run, num_steps=4))
    constant = replace(run, out=tmp_path / "constant", optim=replace(OPTIM, schedule="constant", warmup_steps=1))
    train(constant)
    # the second step would have revived codes in a longer run
    with pytest.raises(UserError, match="what revive_every 1"):
        train(replace(constant, num_steps=4))
    with pytest.raises(UserError, match="has taken 2 steps, got --num-steps 1"):
        train(replace(constant, num_steps=1))


def test_the_documented_call_trains_and_says_how_far_it_is(tmp_path, images, caplog):
    with caplog.at_level(logging.INFO, "isthmus"):
        tokenizer = tokenizer_run(images, tmp_path / "tokenizer", **BRIEF)
        isthmus.train_tokenizer(tokenizer)
        folder = isthmus.train_prior(prior_run(images, tmp_path / "prior", tokenizer.out, **BRIEF))
    assert isthmus.load_pipeline(folder).num_classes == 2
    told = [message for message in caplog.messages if " images/s" in message and "left" in message]
    assert [line.split(", ")[0] for line in told] == [
        f"{what}: step {step}/2" for what in ("tokenizer", "prior") for step in (1, 2)
    ]
