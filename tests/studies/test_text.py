"""The study of words: arms that differ in one thing, on as many parameters, and what a tiny one finds."""

import json
from functools import partial

import pytest

from isthmus.errors import UserError
from isthmus.evaluation import alignment
from isthmus.studies.options import TextStudyOptions
from isthmus.studies.text import ARMS, CLASS, CROSS, RIGHT, TEXT_STUDY, prior_run, trained_parameters
from tests.studies import tiny_studies


def test_arms_train_as_many_parameters():
    setting = TextStudyOptions(budget="full").setting("cpu", 1)
    counts = {name: trained_parameters(setting, prior_run(setting, ARMS[name], 0)) for name in setting.arms}
    assert set(counts) == {"class", "bag", "pooled", "cross", "rotary", "prefix"}
    assert all(count == pytest.approx(counts["cross"], rel=1e-3) for count in counts.values())


def test_arms_differ_in_what_they_are_told_alone():
    setting = TextStudyOptions(budget="full").setting("cpu", 1)
    runs = {
        one.settings["arm"]: one.settings["run"] for one in TEXT_STUDY.plan(setting, ("words",)) if one.kind == "prior"
    }

    def differences(name: str) -> set[str]:
        flat = [
            {
                **runs[arm],
                **{f"{part}.{k}": v for part in ("model", "text") for k, v in runs[arm].get(part, {}).items()},
            }
            for arm in (name, "cross")
        ]
        return {key for key in flat[1] | flat[0] if flat[0].get(key) != flat[1].get(key)} - {"model", "text"}

    assert differences("pooled") == {"text.cross_attention", "model.mlp_ratio"}
    assert differences("bag") == {"text.cross_attention", "text.num_layers", "model.mlp_ratio"}
    assert differences("rotary") == {"model.position", "model.mlp_ratio"}
    assert all(name.startswith("text.") or name == "model.mlp_ratio" for name in differences("class"))


def test_budgets_and_what_a_study_of_words_cannot_read(tmp_path):
    quick, full = (TextStudyOptions(budget=budget).setting("cpu", 1) for budget in ("quick", "full"))
    assert len(quick.seeds) == 1 and len(full.seeds) == 3 and set(quick.arms) < set(full.arms)
    frozen = TextStudyOptions(text_encoder=tmp_path).setting("cpu", 1)
    assert (*quick.arms, "frozen") == frozen.arms and frozen.text_encoder == str(tmp_path)
    for given, words in (
        ({"data": "openmoji"}, "known of avatars alone, got openmoji"),
        ({"text_encoder": tmp_path / "none"}, "--text-encoder must be the folder"),
    ):
        with pytest.raises(UserError, match=words):
            TextStudyOptions(**given)
    with pytest.raises(UserError, match="no class 'gazes'"):
        TextStudyOptions(classes=("gazes",)).setting("cpu", 1)


@pytest.mark.slow
def test_a_tiny_study_fills_its_tables(tmp_path, monkeypatch):
    readers = partial(alignment.attribute_readers, drawings=128, passes=1)
    monkeypatch.setattr(alignment, "attribute_readers", readers)
    setting = tiny_studies.text_setting()
    report = tiny_studies.run(TEXT_STUDY, setting, tmp_path / "study")
    text = report.read_text()
    assert "Not run" not in text and "not measured" not in text and "--text-encoder FOLDER" in text
    for word in (*RIGHT.values(), CLASS.row, CROSS.row, "without the caption", "gaze", "colours", "KD-lite0-192"):
        assert word in text
    values = {
        name: json.loads((tmp_path / "study" / f"samples-{name}-seed0" / "result.json").read_text())["values"]
        for name in setting.arms
    }
    # the class alone knows no caption, so there are no bits without one
    assert "bits per token without words" in values["cross"]["held_out"]
    assert "bits per token without words" not in values["class"]["held_out"]
    counted = [one for one in values["cross"]["attributes"] if one["style"] == "gaze"]
    assert counted and all(0 <= one["right"] <= one["asked"] for one in counted)
