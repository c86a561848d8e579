"""Log lines of a run, for curves and reports."""

import json
from pathlib import Path

LogLines = list[dict[str, float]]


def read_log(path: Path) -> LogLines:
    """Lines of a log.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def column(log: LogLines, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one measurement."""
    rows = [(line["step"], line[name]) for line in log if name in line]
    return [step for step, _ in rows], [value for _, value in rows]


def last(log: LogLines, name: str) -> float:
    """The last value of a measurement; NaN where there is none."""
    values = column(log, name)[1]
    return values[-1] if values else float("nan")
