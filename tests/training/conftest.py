"""Data and a trained tiny model that several tests start from."""

from pathlib import Path

import pytest

from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.training.tiny_runs import prior_run, tokenizer_run, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    """Data spec of twelve images of two classes."""
    return write_images(tmp_path_factory.mktemp("data") / "squares.npz")


@pytest.fixture(scope="session")
def trained_tokenizer(tmp_path_factory, images) -> Path:
    """Run folder of a tokenizer trained for six steps."""
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    train_tokenizer(tokenizer_run(images, out))
    return out


@pytest.fixture(scope="session")
def trained_prior(tmp_path_factory, images, trained_tokenizer) -> Path:
    """Run folder (= pipeline folder) of a prior trained for six steps."""
    out = tmp_path_factory.mktemp("prior") / "run"
    train_prior(prior_run(images, out, trained_tokenizer))
    return out
