import errno
import os
import sys
from types import ModuleType

import pytest

import isthmus as package
from isthmus.cli import COMMANDS, main
from isthmus.cli.options import parse
from isthmus.cli.sample import Sample
from isthmus.errors import UserError
from isthmus.next_scale.runs import TokenizerRun


def test_help_names_every_command_and_every_command_explains_itself(isthmus):
    for words in ([], ["--help"], ["-h"]):
        result = isthmus(*words)
        assert result.code == 0 and all(name in result.out for name in COMMANDS)
    assert isthmus("--version").out.split()[-1] == package.__version__
    assert "train prior" in isthmus("train", "--help").out
    for name in COMMANDS:
        result = isthmus(*name.split(), "--help")
        assert result.code == 0 and f"usage: isthmus {name}" in result.out and result.err == ""


def test_what_cannot_be_parsed_is_one_line(refused):
    for words, said in [
        ("trian prior", "Did you mean train"),
        ("train pryor", "Did you mean prior"),
        ("train critic demo/model --out runs/critic", "isthmus sample MODEL --refine masked"),
        ("train critic --help", "isthmus sample MODEL --refine masked"),
        ("train", "needs one of tokenizer, prior"),
        ("--hepl", "no option"),
        ("sample x --out y --bath-size 3", "Did you mean --batch-size"),
        ("sample x --out y --num many", "--num needs a whole number, got 'many'"),
        ("sample x --out y --top-k many", "--top-k takes {default,off}|INT, got 'many'"),
        ("sample x --out y --dtype float16", "--dtype takes one of 'float32', 'bfloat16'"),
        ("sample x --out y --seed", "--seed needs a value"),
        ("sample x --out y --no-smooth", "--no-smooth is the default here"),
        ("sample x --out y --refine=critic", "Take --refine masked"),
        ("sample x", "missing --out"),
        ("sample x y --out z", "Unrecognized options: y"),
        ("train prior --optim.learning-rat 1", "Did you mean --optim.learning-rate"),
        ("train prior --batch-size 3 --accumulate 2", "multiple of accumulate"),
        ("train tokenizer --preset smal-32", "small-32"),
        ("train tokenizer --image-size 33 --dry-run", "33 px"),
        ("train prior --config nowhere.json", "--config"),
        ("info", "missing"),
    ]:
        assert said in refused(*words.split())


def test_errors_become_one_line_and_an_exit_code_and_our_own_faults_a_traceback(isthmus):
    def failing(error):
        def run(arguments):
            raise error

        return run

    module = ModuleType("failing_command")
    sys.modules["failing_command"], COMMANDS["fail"] = module, ("failing_command:run", "")
    try:
        for error, code, said in [
            (UserError("the rule,\n what arrived"), 2, "isthmus: error: the rule, what arrived\n"),
            (KeyboardInterrupt(), 130, "isthmus: interrupted\n"),
            (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x.png"), 2, "space left on device: 'out/x.png'. Fr"),
            (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/no/x"), 2, "Permission denied: '/no/x'"),
            (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "Try half the --batch-size"),
            (MemoryError(), 2, "memory ran out"),
        ]:
            module.__dict__["run"] = failing(error)
            result = isthmus("fail")
            assert result.code == code and said in result.err and len(result.err.splitlines()) == 1
        module.__dict__["run"] = failing(KeyError("bug"))
        with pytest.raises(KeyError):
            main(["fail"])
    finally:
        del COMMANDS["fail"], sys.modules["failing_command"]


def test_commas_separate_values_but_for_those_in_names_of_classes():
    for words, wanted in [
        (["face,flag", "2"], ("face", "flag", "2")),
        (["tench, Tinca tinca"], ("tench, Tinca tinca",)),
        (["tench, Tinca tinca,face", "id:3"], ("tench, Tinca tinca", "face", "id:3")),
        (["face,", "flag"], ("face", "flag")),
        (["a\\,b,c"], ("a,b", "c")),
    ]:
        for given in (["--classes", *words], [f"--classes={words[0]}", *words[1:]]):
            assert parse(Sample, ["model", "--out", "o", *given], prog="isthmus sample").classes == wanted
    run = parse(TokenizerRun, ["--model.scale-sizes", "1, 2,4", "--data", "openmoji"], prog="isthmus train tokenizer")
    assert run.model.scale_sizes == (1, 2, 4)
