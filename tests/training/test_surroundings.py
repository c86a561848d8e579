"""Where a training runs must not matter: its thread, the caller's defaults, the seed's size, a second start."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from isthmus.errors import UserError
from isthmus.training.config import Run
from isthmus.training.train_diffusion_tokenizer import train_diffusion_tokenizer
from isthmus.training.train_tokenizer import train_tokenizer
from tests.training.test_runs import assert_same
from tests.training.tiny_dar_runs import diffusion_tokenizer_run
from tests.training.tiny_runs import tokenizer_run

pytestmark = pytest.mark.slow

BRIEF = {"num_steps": 2, "save_every": 2, "validate_every": 2, "preview_every": 2}


def tokenizer_weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.out / "image_tokenizer/diffusion_pytorch_model.safetensors")


Training = tuple[Callable[..., Run], Callable[..., Path]]


@pytest.fixture(params=["next-scale", "D-AR"])
def training(request) -> Training:
    """How a tokenizer's run of either family is made, and what trains it."""
    if request.param == "next-scale":
        return tokenizer_run, train_tokenizer
    return diffusion_tokenizer_run, train_diffusion_tokenizer


def test_any_thread_and_any_seed_trains(tmp_path, images, training):
    made, train = training
    run = made(images, tmp_path / "main", seed=2**70, **BRIEF)
    train(run)
    other = made(images, tmp_path / "thread", seed=2**70, **BRIEF)
    thread = threading.Thread(target=train, args=(other,))
    thread.start()
    thread.join()
    assert_same(tokenizer_weights(run), tokenizer_weights(other))


def test_changed_defaults_of_torch_are_refused(tmp_path, images, training):
    made, train = training
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(UserError, match="set_default_dtype"):
            train(made(images, tmp_path / "run", **BRIEF))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not (tmp_path / "run").exists()
