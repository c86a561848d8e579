"""A record is read as it was written; only what was measured alike is compared."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from isthmus.errors import UserError
from isthmus.evaluation.evaluate import remove_by_products, scored_record
from isthmus.evaluation.images import ImageSet
from isthmus.evaluation.record import (
    COMBINATION,
    FORMAT,
    RECORD,
    AttributeCount,
    Curve,
    EvaluationRecord,
    Protocol,
    Readings,
    Score,
    Subject,
    read_record,
    same_protocol,
    write_record,
)
from isthmus.evaluation.report import (
    compare,
    html_page,
    joined,
    look_at_samples,
    markdown_table,
    report_text,
    write_report,
)

SCORES = (
    Score(
        name="KD-lite0-192", value=0.25, better="lower", images=10, measurements=5, error=0.01, floor=0.0, ceiling=2.0
    ),
    Score(name="class accuracy", value=0.5, better="higher", images=20, low=0.4, high=0.6, note="a | b"),
)


def record(**changes) -> EvaluationRecord:
    protocol = Protocol(
        features="lite0",
        features_sha256="a" * 64,
        preprocessing="native size",
        num_samples=20,
        chunk_images=10,
        balance="every class equally often",
        image_size="8 x 8",
        classes=("face", "flag"),
        reference="20 images",
        reference_images=20,
        reference_sha256="b" * 64,
        train_sha256="f" * 64,
        held_out_sha256="0" * 64,
    )
    subject = Subject(
        name="model", kind="SRDD", fingerprint="c" * 64, seed=3, sampling={"guidance_scale": [1.0, 2.0]}, steering={}
    )
    made = EvaluationRecord(
        protocol=protocol,
        subject=subject,
        data={"name": "openmoji", "attribution": "CC0"},
        circumstances={"date": "2026", "versions": {"torch": "2"}},
        warnings=("few images",),
        scores=SCORES,
        class_scores={"face": {"accuracy": 0.5}, "flag": {}},
        measures={"lpips_sha256": ["d" * 64], "solver_steps": [4, 8]},
        held_out=(Score(name="bits per token", value=math.inf),),
        curves=(Curve(name="PSNR, dB", along="scale", positions=("1 x 1", "2 x 2"), values=(9.5, 12.0)),),
        sweep={"1": SCORES, "2": SCORES},
    )
    inner = {name: value for name, value in changes.items() if name in vars(protocol)}
    return replace(made, protocol=replace(protocol, **inner), **{k: v for k, v in changes.items() if k not in inner})


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_record(record(held_out=SCORES), tmp_path)
    assert read_record(tmp_path) == read_record(tmp_path / RECORD) == record(held_out=SCORES)
    write_record(record(), tmp_path)
    assert math.isnan(read_record(tmp_path).held_out[0].value), "JSON has no infinity"


def read_by(fingerprint: str, *counts: AttributeCount) -> Readings:
    reader = {"fingerprint": fingerprint, "training": "9 drawings", "fresh attributes read": 4, "right": 0.5}
    return Readings(reader=reader, attributes=("eyes",), counts=counts)


def test_what_a_reader_saw_is_part_of_a_record_where_one_looked(tmp_path):
    write_record(record(), tmp_path)
    assert "readings" not in json.loads((tmp_path / RECORD).read_text()), "records of before stay what they were"
    count = AttributeCount(prompts="held-out seeds", style="gaze", attribute="eyes", asked=8, right=2, real=7, chance=1)
    pair = replace(count, attribute=COMBINATION, asked=4)
    with_readings = record(held_out=SCORES, readings=read_by("a" * 64, count, pair))
    write_record(with_readings, tmp_path)
    assert read_record(tmp_path) == with_readings
    text = report_text(with_readings, tmp_path)
    assert "| gaze | eyes | 25.0% [7.1%, 59.1%] of 8; real 87.5%, chance 12.5% |" in text
    assert "| all styles | parts | 25.0%" in text and "| all styles | colours |" not in text
    assert "| all styles | combination | 50.0%" in text
    # records of before say nothing of reconstructions
    assert "rebuilt" not in (tmp_path / RECORD).read_text() and "reconstructions" not in text
    counts = [replace(count, rebuilt=5), replace(pair, rebuilt=0)]
    with_rebuilt = replace(with_readings, readings=read_by("a" * 64, *counts))
    write_record(with_rebuilt, tmp_path)
    assert read_record(tmp_path) == with_rebuilt
    text = report_text(with_rebuilt, tmp_path)
    assert "| style | attribute | held-out seeds | reconstructions |" in text
    assert "real 87.5%, chance 12.5% | 62.5% |" in text and "lost by the tokenizer" in text
    assert same_protocol(with_readings, with_rebuilt) == []
    # one without readings compares, one of another reader does not
    assert same_protocol(record(), with_readings) == []
    assert same_protocol(with_readings, record(readings=read_by("b" * 64))) == ["reader of attributes"]
    other = replace(read_by("a" * 64), attributes=("mouth",))
    assert same_protocol(with_readings, record(readings=other)) == ["attributes: eyes and mouth"]


def test_other_ways_of_measuring_are_refused_in_words(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_record(record(), tmp_path / "a")
    for change, said in (
        ({"features": "inception"}, "feature network"),
        ({"features_sha256": "d" * 64}, "weights"),
        ({"preprocessing": "299 px"}, "preprocessing"),
        ({"num_samples": 40}, "number of samples N: 20 and 40"),
        ({"chunk_images": 5}, "per measurement"),
        ({"balance": "as in the data"}, "balance"),
        ({"image_size": "16 x 16"}, "image size"),
        ({"classes": ("face",)}, "classes: face, flag and face"),
        ({"reference_images": 21}, "number of reference images: 20 and 21"),
        ({"reference_sha256": "d" * 64}, "reference images"),
        ({"train_sha256": "d" * 64}, "training images: ffffffffffff and dddddddddddd"),
        ({"held_out_sha256": ""}, "held-out images: 000000000000 and none"),
    ):
        assert [said in difference for difference in same_protocol(record(), record(**change))] == [True]
        write_record(record(**change), tmp_path / "b")
        with pytest.raises(UserError, match=f"different ways.*{said}"):
            compare([tmp_path / "a", tmp_path / "b"])


def test_model_seed_and_guidance_are_free(tmp_path):
    other = record(subject=replace(record().subject, seed=4, fingerprint="e" * 64, sampling={}), scores=SCORES[:1])
    assert same_protocol(record(), other) == []
    for name, one in (("a", record()), ("b", other)):
        (tmp_path / name).mkdir()
        write_record(one, tmp_path / name)
    table = compare([tmp_path / "a", tmp_path / "b"])
    assert "| KD-lite0-192 | lower | 0.25 +- 0.01 (standard error) | 0.25" in table and "N = 20" in table
    assert "| class accuracy | higher | 0.5 [0.4, 0.6] |  |" in table, "what one of them has not is left empty"


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        read_record(tmp_path)
    for text in ("{", "[]", f'{{"format": {FORMAT}}}'):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(UserError, match="not the record"):
            read_record(tmp_path)
    write_record(record(), tmp_path)
    values = json.loads((tmp_path / RECORD).read_text())
    without = {name: value for name, value in values.items() if name != "warnings"}
    other_type = values | {"subject": values["subject"] | {"seed": [1]}}
    for damaged in (without, other_type):
        (tmp_path / RECORD).write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="not the record"):
            read_record(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps(values | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match="Update"):
        read_record(tmp_path)


def test_records_of_earlier_formats_are_refused_and_scored_again(tmp_path):
    now = record()
    sweep = list(now.sweep)
    for version in (1, 2):
        write_record(now, tmp_path)
        values = json.loads((tmp_path / RECORD).read_text())
        if version == 1:  # without fingerprints of the data set
            del values["protocol"]["train_sha256"], values["protocol"]["held_out_sha256"]
        (tmp_path / RECORD).write_text(json.dumps(values | {"format": version}))
        with pytest.raises(UserError, match=rf"format {version}.*Evaluate again"):
            read_record(tmp_path)
        assert scored_record(tmp_path, now.protocol, now.subject, sweep=sweep) is None
        with pytest.raises(UserError, match="other weights"):
            scored_record(tmp_path, now.protocol, replace(now.subject, fingerprint="e" * 64), sweep=sweep)


def test_what_lies_beside_a_record_goes_with_it(tmp_path):
    for name in ("samples.npz", "statistics.npz", "report.md"):
        (tmp_path / name).write_text("of 2,000 samples")
    remove_by_products(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"], "written again with the record"


def test_only_what_was_asked_for_in_the_same_way_is_finished(tmp_path):
    now = record(held_out=SCORES)
    write_record(now, tmp_path)
    sweep = list(now.sweep)
    assert scored_record(tmp_path, now.protocol, now.subject, sweep=sweep) == now
    assert scored_record(tmp_path, now.protocol, now.subject, sweep=sweep[:1]) is None
    for name in ("train_sha256", "held_out_sha256"):
        more_images = replace(now.protocol, **{name: "9" * 64})
        assert scored_record(tmp_path, more_images, now.subject, sweep=sweep) is None


def test_only_files_of_an_evaluation_may_lie_in_its_folder(tmp_path):
    now = record()
    for name in ("report.md", "samples.png"):
        (tmp_path / name).write_text("x")
    assert scored_record(tmp_path, now.protocol, now.subject, sweep=[]) is None
    (tmp_path / "holiday.png").write_text("x")
    with pytest.raises(UserError, match="holiday.png"):
        scored_record(tmp_path, now.protocol, now.subject, sweep=[])


def test_pictures_of_an_earlier_scoring_are_not_shown(tmp_path):
    write_report(record(), tmp_path)
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "sweep.png").is_file()
    (tmp_path / "neighbours.png").write_bytes(b"of other images")
    picture = np.zeros((8, 8, 3), np.uint8)
    images = ImageSet("two", "0", None, (), 2, lambda: iter([picture, picture + 1]))
    look_at_samples(images, None, (), tmp_path, None, None)
    write_report(record(curves=(), sweep={}), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"samples.png", "report.html", "report.md"}


def test_every_score_is_reported_with_what_made_it(tmp_path):
    text = report_text(record(), tmp_path)
    for needed in ("0.25", "+- 0.01", "[0.4, 0.6]", "N = 20", "n = 10", "lite0", "seed 3, guidance 1,2", "few images"):
        assert needed in text, needed
    assert "5 x 10" in text and "a \\| b" in text and "CC0" in text


def test_reports_are_written_whole(tmp_path):
    write_report(record(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page, "one file that needs nothing else"
    assert "![Scores against guidance](sweep.png)" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob(".*partial"))


def test_a_page_holds_the_text_and_its_pictures(tmp_path):
    (tmp_path / "dot.png").write_bytes(b"picture")
    pictures = "![dot](dot.png) ![none](none.png)"
    text = joined(["# A & B", markdown_table(("a", "b"), [("<i>", "x | y")]), pictures, "> **Note.** `c`"])
    page = html_page(text, tmp_path, title="<title>")
    for needed in ("<h1>A &amp; B</h1>", "<td>&lt;i&gt;</td>", "<td>x | y</td>", "<blockquote>", "<code>c</code>"):
        assert needed in page, needed
    assert 'src="data:image/png;base64,cGljdHVyZQ=="' in page and 'src="none.png"' in page
    assert "<title>&lt;title&gt;</title>" in page
