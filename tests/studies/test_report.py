"""A table from constructed results: known verdicts, and what was not run."""

import pytest

from isthmus.errors import UserError
from isthmus.studies.experiments import Experiment
from isthmus.studies.options import chosen_tables
from isthmus.studies.study import Study
from isthmus.studies.tables import Claim, Line, Panel, Reading, Row, StudyTable, TableSpec, line_of
from tests.studies.tiny_studies import run

THREE = {"low": (1.0, 1.1, 1.2), "high": (2.0, 2.1, 2.3), "near": (1.05, 1.0, 1.3)}


def claim(first: str, second: str, direction) -> Claim:
    return Claim(
        says=f"{first} is {direction}", source="by hand", first=first, second=second, column="x", direction=direction
    )


def table(setting, results) -> StudyTable:
    rows = [
        Row(name=name, facts={"N": "5"}, cells={"x": {seed: Reading(value) for seed, value in enumerate(values)}})
        for name, values in results["made"]["rows"].items()
    ]
    return StudyTable(
        about="Numbers made by hand.",
        first_column="row",
        rows=tuple(rows),
        claims=(
            claim("low", "high", "lower"),
            claim("low", "high", "higher"),
            claim("low", "near", "lower"),
            claim("low", "absent", "lower"),
        ),
        panels=(Panel(title="x by hand", along="step", lines=(Line(name="low", x=[0, 1], y=[1, 2]),)),),
    )


SPECS = (
    TableSpec(
        name="hand", title="By hand", experiments=lambda setting: [Experiment(name="made", kind="make")], make=table
    ),
    TableSpec(
        name="other", title="Another", experiments=lambda setting: [Experiment(name="never", kind="make")], make=table
    ),
)
STUDY = Study(
    name="tiny",
    title="Tiny",
    tables=SPECS,
    work=lambda setting, folder: {"make": lambda experiment: {"rows": THREE}},
    summary=lambda setting: ["Words."],
)


def test_verdicts_of_known_numbers():
    verdicts = [finding.verdict for finding in table(None, {"made": {"rows": THREE}}).findings()]
    assert verdicts == ["agrees", "does not agree", "cannot tell", "cannot tell"]


def test_the_report_has_numbers_claims_curves_and_what_was_not_run(tmp_path):
    report = run(STUDY, None, tmp_path, tables=("hand",))
    text, page = report.read_text(), (tmp_path / "report.html").read_text()
    for word in ("1.1 ± 0.1 (3 seeds)", "agrees", "cannot tell", "not measured", "Not run. `--tables other`"):
        assert word in text
        assert word.replace("`", "") in page.replace("<code>", "").replace("</code>", "")
    assert "(hand.png)" in text and "data:image/png;base64," in page
    assert not (tmp_path / "never").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="must be new, empty"):
        run(STUDY, None, tmp_path, tables=("hand",))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_of_another_study_is_refused(tmp_path):
    run(STUDY, None, tmp_path / "a", tables=("hand",))
    other = Study(**{**vars(STUDY), "name": "other"})
    with pytest.raises(UserError, match="holds the study tiny, this is other"):
        run(other, None, tmp_path / "a", tables=("hand",))


def test_a_study_does_not_go_on_with_other_images(tmp_path):
    run(STUDY, None, tmp_path / "a", tables=("hand",))
    with pytest.raises(UserError, match="a study of other images"):
        run(STUDY, None, tmp_path / "a", tables=("hand",), images={"train": "others", "val": "others"})


def test_unknown_tables_are_refused():
    with pytest.raises(UserError, match="hand, other, got hnad"):
        chosen_tables(("hnad",), ("hand",), STUDY.table_names)


def test_bars_need_an_interval_or_several_seeds():
    assert line_of("a", {0: {0: Reading(1.0)}}).half_widths == ()
    assert line_of("a", {0: {0: Reading(1.0, 0.5, 1.5)}}).half_widths == [0.5]
    line = line_of("a", {0: {0: Reading(1.0), 1: Reading(3.0)}})
    # mean 2, deviation sqrt 2, one degree of freedom
    assert (line.y, line.half_widths) == ([2.0], [pytest.approx(12.706, rel=1e-4)])
