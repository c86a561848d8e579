"""Commands run in this process; their exit code and what they print."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from isthmus.cli import main
from tests.pipelines.tiny import tiny_pipeline
from tests.pipelines.tiny_dar import tiny_dar


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def isthmus(capsys):
    """Run a command line, given as words."""

    def run(*words) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(isthmus):
    """Run a command line that must be refused in one line with exit code 2; returns that line."""

    def run(*words) -> str:
        result = isthmus(*words)
        assert result.code == 2, result
        assert len(result.err.splitlines()) == 1 and result.err.startswith("isthmus: error: "), result.err
        return result.err

    return run


SAVED_WITH = {
    "sampling_defaults": {"guidance_scale": 2.0, "top_k": 8},
    "data": {"name": "drawings", "attribution": "CC0"},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A saved pipeline folder with three classes."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tiny_pipeline(**SAVED_WITH).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dar_model(tmp_path_factory) -> Path:
    """A saved D-AR pipeline with three classes."""
    folder = tmp_path_factory.mktemp("cli") / "tiny-dar"
    tiny_dar(**SAVED_WITH).save_pretrained(folder)
    return folder
