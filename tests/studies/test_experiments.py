"""Experiments are run once, in order, and a killed study goes on."""

import json

import pytest

from isthmus.errors import UserError
from isthmus.studies.experiments import RESULT, Experiment, facts_of, finished, ordered, run_experiments

PLAN = [
    Experiment(name="one", kind="square", settings={"of": 3}),
    Experiment(name="two", kind="square", settings={"of": 4}, after=("one",)),
]


class Squares:
    """Counts what is run; stops, as Ctrl-C does, before the experiment named."""

    def __init__(self, stop_before: str = ""):
        self.ran, self.stop_before = [], stop_before

    def __call__(self, experiment):
        if experiment.name == self.stop_before:
            raise KeyboardInterrupt
        self.ran.append(experiment.name)
        return {"square": experiment.settings["of"] ** 2}

    def run(self, folder, plan=PLAN):
        return run_experiments(
            plan, folder, {"square": self}, made=lambda: {"date": f"day {len(self.ran)}", "cores": 2}
        )


def test_finished_experiments_are_not_run_again(tmp_path):
    first, again = Squares(), Squares()
    results = first.run(tmp_path)
    assert results == {"one": {"square": 9}, "two": {"square": 16}}
    assert again.run(tmp_path) == results
    assert (first.ran, again.ran) == (["one", "two"], [])


def test_a_killed_study_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Squares(stop_before="two").run(tmp_path)
    assert (tmp_path / "one" / RESULT).is_file() and not (tmp_path / "two" / RESULT).exists()
    later = Squares()
    assert later.run(tmp_path)["two"] == {"square": 16}
    assert later.ran == ["two"]


def test_a_damaged_result_is_made_again(tmp_path):
    Squares().run(tmp_path)
    (tmp_path / "two" / RESULT).write_text('{"values": ')
    later = Squares()
    later.run(tmp_path)
    assert later.ran == ["two"]


def test_results_of_other_settings_are_refused_before_anything_runs(tmp_path):
    Squares().run(tmp_path)
    changed = [
        Experiment(name="new", kind="square", settings={"of": 1}),
        Experiment(name="two", kind="square", settings={"of": 5}),
    ]
    later = Squares()
    with pytest.raises(UserError, match=r"two was made with another of \(4, now 5\)"):
        later.run(tmp_path, changed)
    assert later.ran == []


def test_settings_that_json_writes_otherwise_are_the_same(tmp_path):
    plan = [Experiment(name="a", kind="square", settings={"of": 2, "pair": (1, 2)})]
    Squares().run(tmp_path, plan)
    assert finished(plan, tmp_path) == {"a": {"square": 4}}
    assert json.loads((tmp_path / "a" / RESULT).read_text())["settings"]["pair"] == [1, 2]


def test_what_made_the_results_is_that_of_every_result(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Squares(stop_before="two").run(tmp_path)
    facts = facts_of(PLAN, tmp_path)
    assert (facts["date"], facts["cores"], facts["experiments"]) == ("day 1", 2, 2)
    record = json.loads((tmp_path / "one" / RESULT).read_text())
    (tmp_path / "one" / RESULT).write_text(json.dumps({**record, "made": {"date": "day 0", "cores": 4}, "seconds": 60}))
    Squares().run(tmp_path)
    facts = facts_of(PLAN, tmp_path)
    assert (facts["date"], facts["cores"]) == (["day 0", "day 1"], [4, 2])
    assert facts["minutes of all experiments"] == pytest.approx(1.0, abs=0.1)


def test_an_experiment_named_twice_is_run_once():
    assert ordered([*PLAN, *PLAN]) == PLAN


@pytest.mark.parametrize(
    "plan, message",
    [
        ([PLAN[0], Experiment(name="one", kind="cube")], "two experiments are called one"),
        (PLAN[1:], "two reads one"),
    ],
)
def test_a_plan_that_cannot_run_is_our_own_fault(plan, message):
    with pytest.raises(ValueError, match=message):
        ordered(plan)
