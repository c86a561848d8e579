"""A table from constructed results: known verdicts, and what was not run."""

import pytest

from isthmus.errors import UserError
from isthmus.studies.experiments import Experiment
from isthmus.studies.options import DarStudyOptions, SrddStudyOptions
from isthmus.studies.study import Study
from isthmus.studies.tables import Claim, Found, Panel, Reading, Row, StudyTable, mean_and_half_width, study_table
from tests.studies.tiny_studies import run, srdd_setting

SETTING = srdd_setting("")
THREE = {"low": (1.0, 1.1, 1.2), "high": (2.0, 2.1, 2.3), "near": (1.05, 1.0, 1.3)}


def made(setting) -> list[Experiment]:
    return [Experiment(name="made", kind="make", work=lambda lab, experiment: {"rows": THREE})]


@study_table("By hand", made)
def hand(found) -> StudyTable:
    rows = [
        Row(name=name, facts={"N": "5"}, cells={"x": {seed: Reading(value) for seed, value in enumerate(values)}})
        for name, values in found.results["made"]["rows"].items()
    ]
    sides = (("high", "lower"), ("high", "higher"), ("near", "lower"), ("absent", "lower"))
    return StudyTable(
        about="Numbers made by hand.",
        first_column="row",
        rows=tuple(rows),
        claims=tuple(
            Claim(f"low is {direction}", "by hand", "low", other, "x", direction) for other, direction in sides
        ),
        panels=(Panel("x by hand", "step", {"low": {0: {0: Reading(1.0)}, 1: {0: Reading(2.0)}}}),),
    )


@study_table("Another", lambda setting: [Experiment(name="never", kind="make", work=lambda lab, experiment: {})])
def other(found) -> StudyTable:
    raise AssertionError("nobody asks for it")


STUDY = Study(name="tiny", title="Tiny", tables=(hand, other), summary=lambda setting: "Words.")


def test_verdicts_of_known_numbers():
    found = hand.make(Found(SETTING, {"made": {"rows": THREE}})).findings()
    verdicts = [difference.verdict(claim.direction) for claim, difference in found]
    assert verdicts == ["agrees", "does not agree", "cannot tell", "cannot tell"]


def test_the_report_has_numbers_claims_curves_and_what_was_not_run(tmp_path):
    report = run(STUDY, SETTING, tmp_path, tables=("hand",))
    text, page = report.read_text(), (tmp_path / "report.html").read_text()
    for word in ("1.1 ± 0.1 (3 seeds)", "agrees", "cannot tell", "not measured", "Not run. `--tables other`"):
        assert word in text
        assert word.replace("`", "") in page.replace("<code>", "").replace("</code>", "")
    assert "(hand.png)" in text and "data:image/png;base64," in page
    assert not (tmp_path / "never").exists()


def test_a_study_goes_on_in_its_own_folder_with_its_own_images_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="must be new, empty"):
        run(STUDY, SETTING, tmp_path, tables=("hand",))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    run(STUDY, SETTING, tmp_path / "a", tables=("hand",))
    with pytest.raises(UserError, match="holds the study tiny, this is other"):
        run(Study(**{**vars(STUDY), "name": "other"}), SETTING, tmp_path / "a", tables=("hand",))
    with pytest.raises(UserError, match="a study of other images"):
        run(STUDY, SETTING, tmp_path / "a", tables=("hand",), images={"train": "others", "val": "others"})


def test_options_that_no_study_has_are_refused():
    with pytest.raises(UserError, match="hand, other, got hnad"):
        DarStudyOptions(tables=("hnad",)).tables_among(STUDY.table_names)
    for given, words in (
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"num": 1}, "--num must be at least 2"),
    ):
        with pytest.raises(UserError, match=words):
            DarStudyOptions(**given)


def test_what_cannot_be_told_is_said_to_be_small(tmp_path):
    """Differences -0.05, 0.1, -0.1: deviation 0.104, half width 4.303 * 0.104 / sqrt(3), of a mean of 1.117."""
    text = run(STUDY, SETTING, tmp_path, tables=("hand",)).read_text()
    assert "| 0.259 (23.2 %) | cannot tell: at most 0.275 (24.6 %) apart |" in text
    assert "4 verdicts stand here, of which 2 cannot be told" in text


def test_data_without_end_buy_more_of_everything():
    ours, theirs = (SrddStudyOptions(budget="full", data=data) for data in ("avatars:gaze,moods", "openmoji"))
    for name in ("num", "tokenizer_steps", "prior_steps"):
        assert getattr(ours.amount, name) > getattr(theirs.amount, name)
    assert ours.chosen_classes is None and theirs.chosen_classes == ("face", "flag", "hand", "person")
    assert SrddStudyOptions(data="openmoji", classes=("all",)).chosen_classes is None


def test_bars_need_an_interval_or_several_seeds():
    assert mean_and_half_width({0: Reading(1.0)}) == (1.0, None)
    assert mean_and_half_width({0: Reading(1.0, 0.5, 1.5)}) == (1.0, 0.5)
    # mean 2, deviation sqrt 2, one degree of freedom
    assert mean_and_half_width({0: Reading(1.0), 1: Reading(3.0)}) == (2.0, pytest.approx(12.706, rel=1e-4))
