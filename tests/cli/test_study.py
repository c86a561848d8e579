"""`isthmus study`: what cannot be run is one line and exit code 2, and nothing is written."""

import pytest

from isthmus.cli import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("study", ["srdd", "dar"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", "huge"], "--budget takes one of"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--num", "1"], "--num must be at least 2"),
        (["--tables", "maks"], "--tables takes names of"),
        (["--preset-prior", "nothing-like-it"], "presets have no 'nothing-like-it'"),
        (["--device", "cuda"], "device must be auto or one of those present"),
        (["--sedes", "2"], "Did you mean --seeds"),
    ],
)
def test_bad_arguments(study, arguments, message, tmp_path, capsys, no_gpu):
    code = main(["study", study, *arguments, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["study", "srdd", "--out", str(tmp_path)]) == 2
    assert "must be new, empty or the folder of this study" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_data_that_are_not_there_stop_before_any_training(tmp_path, capsys):
    assert main(["study", "dar", "--data", "folder:/nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "/nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["study"]) == 2
    assert "study needs one of srdd, dar" in capsys.readouterr().err


@pytest.fixture
def no_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so --device cuda is no mistake")
