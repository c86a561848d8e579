import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import isthmus as package
from isthmus.cli import COMMANDS, main
from isthmus.cli.options import parse
from isthmus.cli.sample import Sample
from isthmus.errors import UserError
from isthmus.next_scale.runs import TokenizerRun

REPOSITORY = Path(__file__).parents[2]


def test_help_names_every_command(isthmus):
    for words in ([], ["--help"], ["-h"]):
        result = isthmus(*words)
        assert result.code == 0 and all(name in result.out for name in COMMANDS)
    assert isthmus("--version").out.split()[-1] == package.__version__
    assert "train prior" in isthmus("train", "--help").out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(isthmus, name):
    result = isthmus(*name.split(), "--help")
    assert result.code == 0 and f"usage: isthmus {name}" in result.out and result.err == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom isthmus.cli import main\n"
        "assert main(['--help']) == 0 and main(['train', 'prior', '--help']) == 0 and main(['sample', '--help']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian prior", "Did you mean train"),
        ("train pryor", "Did you mean prior"),
        ("train critic demo/model --out runs/critic", "isthmus sample MODEL --refine masked"),
        ("train critic --help", "isthmus sample MODEL --refine masked"),
        ("train", "needs one of tokenizer, prior"),
        ("--hepl", "no option"),
        ("sample x --out y --bath-size 3", "Did you mean --batch-size"),
        ("sample x --out y --num many", "--num needs a whole number, got 'many'"),
        ("sample x --out y --top-k many", "--top-k takes"),
        ("sample x --out y --dtype float16", "--dtype takes one of 'float32', 'bfloat16'"),
        ("sample x --out y --seed", "--seed needs a value"),
        ("sample x", "missing --out"),
        ("sample x y --out z", "y"),
        ("train prior --optim.learning-rat 1", "Did you mean --optim.learning-rate"),
        ("train prior --batch-size 3 --accumulate 2", "multiple of accumulate"),
        ("train tokenizer --preset smal-32", "small-32"),
        ("train tokenizer --image-size 33 --dry-run", "33 px"),
        ("train prior --config nowhere.json", "--config"),
        ("info", "missing"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(refused, words, said):
    assert said in refused(*words.split())


def failing(error):
    """A command that fails with this error, for the one place where errors become exit codes."""
    module = type(sys)("failing_command")
    module.run = lambda arguments: (_ for _ in ()).throw(error)
    return module


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the rule,\n what arrived"), 2, "isthmus: error: the rule, what arrived\n"),
        (KeyboardInterrupt(), 130, "isthmus: interrupted\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x.png"), 2, "the disk is full (writing out/x.png)"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/nowhere/x"), 2, "Permission denied: '/nowhere/x'"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "Try half the --batch-size"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(isthmus, error, code, said):
    sys.modules["failing_command"] = failing(error)
    COMMANDS["fail"] = ("failing_command:run", "")
    try:
        result = isthmus("fail")
    finally:
        del COMMANDS["fail"], sys.modules["failing_command"]
    assert result.code == code and said in result.err and len(result.err.splitlines()) == 1


def test_our_own_faults_keep_their_traceback():
    sys.modules["failing_command"] = failing(KeyError("bug"))
    COMMANDS["fail"] = ("failing_command:run", "")
    try:
        with pytest.raises(KeyError):
            main(["fail"])
    finally:
        del COMMANDS["fail"], sys.modules["failing_command"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["face,flag", "2"], ("face", "flag", "2")),
        (["tench, Tinca tinca"], ("tench, Tinca tinca",)),
        (["tench, Tinca tinca,face", "id:3"], ("tench, Tinca tinca", "face", "id:3")),
        (["face,", "flag"], ("face", "flag")),
        (["a\\,b,c"], ("a,b", "c")),
    ],
)
def test_names_of_classes_may_have_commas(words, wanted):
    for given in (["--classes", *words], [f"--classes={words[0]}", *words[1:]]):
        assert parse(Sample, ["model", "--out", "o", *given], prog="isthmus sample").classes == wanted


def test_commas_separate_numbers_whatever_follows():
    run = parse(TokenizerRun, ["--model.scale-sizes", "1, 2,4", "--data", "openmoji"], prog="isthmus train tokenizer")
    assert run.model.scale_sizes == (1, 2, 4)
