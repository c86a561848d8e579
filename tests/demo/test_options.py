from itertools import product
from pathlib import Path

import pytest

from isthmus.cli.options import parse
from isthmus.demo.options import DemoOptions
from isthmus.errors import UserError


def read(*words: str) -> DemoOptions:
    return parse(DemoOptions, words, prog="isthmus demo")


def test_every_family_and_budget_has_a_folder_of_its_own():
    made = {DemoOptions(family=f, budget=b).folder for f, b in product(("next-scale", "dar"), ("short", "long"))}
    assert made == {Path(name) for name in ("demo", "demo-long", "demo-dar", "demo-dar-long")}


def test_a_folder_that_is_named_wins():
    assert read("--family", "dar", "--budget", "long", "--out", "elsewhere").folder == Path("elsewhere")


def test_all_classes_are_all_and_a_few_are_those():
    assert read("--classes", "all").chosen_classes is None
    assert read("--classes", "flag,hand").chosen_classes == ("flag", "hand")
    assert len(read().chosen_classes or ()) == 4


@pytest.mark.parametrize(("option", "known"), [("family", "'next-scale', 'dar'"), ("budget", "'short', 'long'")])
def test_what_there_is_not_is_refused_with_what_there_is(option, known):
    with pytest.raises(UserError, match=f"--{option} takes one of {known}"):
        read(f"--{option}", "medium")
