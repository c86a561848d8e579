"""Data and trained tiny models of both families that several tests start from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from isthmus.training.config import Run
from tests.made_once import made_once
from tests.training.tiny_runs import (
    diffusion_tokenizer_run,
    next_token_prior_run,
    prior_run,
    tokenizer_run,
    train,
    with_captions,
    write_images,
)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    """Data spec of twelve images of two classes."""
    return made_once(tmp_path_factory, "squares", lambda folder: write_images(folder / "squares.npz"))


@pytest.fixture(scope="session")
def captioned(tmp_path_factory, images) -> str:
    """The squares of `images`, their colour in words."""
    return made_once(tmp_path_factory, "captioned", lambda folder: with_captions(images, folder / "squares.npz"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Callable[[str, Callable[[Path], Run]], Path]:
    """Run folder by name, trained where it is asked for first."""
    return lambda name, run_in: made_once(tmp_path_factory, name, lambda folder: train(run_in(folder / "run")))


@pytest.fixture(scope="session")
def trained_tokenizer(images, trained) -> Path:
    """Run folder of a multi-scale tokenizer trained for six steps."""
    return trained("trained-tokenizer", lambda out: tokenizer_run(images, out))


@pytest.fixture(scope="session")
def trained_prior(images, trained, trained_tokenizer) -> Path:
    """Run folder (= pipeline folder) of a next-scale prior trained for six steps."""
    return trained("trained-prior", lambda out: prior_run(images, out, trained_tokenizer))


@pytest.fixture(scope="session")
def trained_dar_tokenizer(images, trained) -> Path:
    """Run folder of a diffusion tokenizer trained for six steps."""
    return trained("trained-dar-tokenizer", lambda out: diffusion_tokenizer_run(images, out))


@pytest.fixture(scope="session")
def trained_dar_prior(images, trained, trained_dar_tokenizer) -> Path:
    """Run folder (= pipeline folder) of a Llama trained for six steps."""
    return trained("trained-dar-prior", lambda out: next_token_prior_run(images, out, trained_dar_tokenizer))
