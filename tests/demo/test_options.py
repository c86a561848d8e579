from itertools import product
from pathlib import Path

from isthmus.cli.options import parse
from isthmus.demo.options import DemoOptions


def read(*words: str) -> DemoOptions:
    return parse(DemoOptions, words, prog="isthmus demo")


def test_every_family_and_budget_has_a_folder_of_its_own_unless_one_is_named():
    made = {DemoOptions(family=f, budget=b).folder for f, b in product(("next-scale", "dar"), ("short", "long"))}
    assert made == {Path(name) for name in ("demo", "demo-long", "demo-dar", "demo-dar-long")}
    assert read("--family", "dar", "--budget", "long", "--out", "elsewhere").folder == Path("elsewhere")


def test_all_classes_are_all_and_a_few_are_those():
    assert read("--data", "avatars").chosen_classes is None and read("--classes", "all").chosen_classes is None
    assert read("--classes", "flag,hand").chosen_classes == ("flag", "hand")
    assert len(read("--data", "openmoji").chosen_classes or ()) == 4
