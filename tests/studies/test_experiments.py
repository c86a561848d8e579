"""Experiments are run once, in order, and a killed study goes on."""

import json
from dataclasses import replace

import pytest

from isthmus.errors import UserError
from isthmus.studies.experiments import RESULT, Experiment, facts_of, finished, ordered, run_experiments


def square(number: int, name: str, after: tuple[str, ...] = ()) -> Experiment:
    work = lambda squares, experiment: squares(experiment)  # noqa: E731  it is a field
    return Experiment(name=name, kind="square", work=work, settings={"of": number}, after=after)


PLAN = [square(3, "one"), square(4, "two", after=("one",))]


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
        return run_experiments(plan, folder, self, made=lambda: {"date": f"day {len(self.ran)}", "cores": 2})


def test_what_is_missing_or_damaged_is_run_and_nothing_else(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Squares(stop_before="two").run(tmp_path)
    assert (tmp_path / "one" / RESULT).is_file() and not (tmp_path / "two" / RESULT).exists()
    later, again, damaged = Squares(), Squares(), Squares()
    assert later.run(tmp_path) == again.run(tmp_path) == {"one": {"square": 9}, "two": {"square": 16}}
    (tmp_path / "two" / RESULT).write_text('{"values": ')
    assert damaged.run(tmp_path)["two"] == {"square": 16}
    assert (later.ran, again.ran, damaged.ran) == (["two"], [], ["two"])


def test_results_of_other_settings_are_refused_before_anything_runs(tmp_path):
    Squares().run(tmp_path)
    later = Squares()
    with pytest.raises(UserError, match=r"two was made with another of \(4, now 5\)"):
        later.run(tmp_path, [square(1, "new"), square(5, "two")])
    assert later.ran == []


def test_settings_that_json_writes_otherwise_are_the_same(tmp_path):
    plan = [replace(PLAN[0], name="a", settings={"of": 2, "pair": (1, 2)})]
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


def test_a_plan_has_each_experiment_once_behind_what_it_reads():
    assert ordered([*PLAN, *PLAN]) == PLAN
    with pytest.raises(ValueError, match="two experiments are called one"):
        ordered([PLAN[0], replace(PLAN[0], kind="cube")])
    with pytest.raises(ValueError, match="two reads one"):
        ordered(PLAN[1:])
