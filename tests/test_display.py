import logging

from isthmus.display import Display


def lines_of(caplog, total: int | None, **options) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "isthmus"), Display("prior", total, "step", **options) as display:
        for step in range(1, 5):
            display.update()
            display.measured({"bits": f"{step}.0"}, images=step)
    return caplog.messages


def test_a_file_gets_a_line_at_the_first_and_the_last_measurement(caplog):
    first, last = lines_of(caplog, 4, images_each=8)
    assert first.startswith("prior: step 1/4, ") and ", bits 1.0, " in first and first.endswith(" left")
    assert "images/s" in last and last.startswith("prior: step 4/4, ") and last.endswith(", 0 s left")
    assert lines_of(caplog, 14, initial=10)[1].startswith("prior: step 14/14")
    assert lines_of(caplog, None)[0].endswith("bits 1.0")
    assert lines_of(caplog, 4, shown=False) == []
