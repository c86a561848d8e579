"""Data and a trained tiny model that several tests start from."""

from pathlib import Path

import pytest

from isthmus.training.train_prior import train_prior
from isthmus.training.train_tokenizer import train_tokenizer
from tests.made_once import made_once
from tests.training.tiny_runs import prior_run, tokenizer_run, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    """Data spec of twelve images of two classes."""
    return made_once(tmp_path_factory, "squares", lambda folder: write_images(folder / "squares.npz"))


@pytest.fixture(scope="session")
def trained_tokenizer(tmp_path_factory, images) -> Path:
    """Run folder of a tokenizer trained for six steps."""

    def train(folder: Path) -> Path:
        train_tokenizer(tokenizer_run(images, folder / "run"))
        return folder / "run"

    return made_once(tmp_path_factory, "trained-tokenizer", train)


@pytest.fixture(scope="session")
def trained_prior(tmp_path_factory, images, trained_tokenizer) -> Path:
    """Run folder (= pipeline folder) of a prior trained for six steps."""

    def train(folder: Path) -> Path:
        train_prior(prior_run(images, folder / "run", trained_tokenizer))
        return folder / "run"

    return made_once(tmp_path_factory, "trained-prior", train)
