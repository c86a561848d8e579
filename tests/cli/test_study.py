"""`isthmus study`: what cannot be run is one line and exit code 2, and nothing is written."""

import pytest

from isthmus.cli import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("study", ["srdd", "dar", "text"])
def test_bad_arguments_stop_before_any_training(study, tmp_path, capsys):
    for arguments, message in (
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--tables", "maks"], "--tables takes names of"),
        (["--preset-prior", "nothing-like-it"], "presets have no 'nothing-like-it'"),
        (["--data", "folder:/nowhere"], "/nowhere"),
    ):
        code = main(["study", study, *arguments, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert code == 2 and message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
