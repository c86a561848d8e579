"""The folder of an evaluation: whether it holds a finished one, and what is written at the end."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from isthmus.errors import UserError
from isthmus.evaluation.protocol import RECORD, EvaluationRecord, Protocol, Score, Subject, read_record
from isthmus.evaluation.report import write_report

logger = logging.getLogger("isthmus")


def finished_record(
    out: Path, protocol: Protocol, subject: Subject, *, sweep: list[str], measures: dict[str, Any]
) -> EvaluationRecord | None:
    """The record of an earlier run that asked for the same; None where there is something to do.

    Raises:
        UserError: `out` is a file, or holds the evaluation of something else, or other things.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Choose another name.")
    if not (out / RECORD).is_file():
        foreign = [
            path.name
            for path in (out.iterdir() if out.exists() else ())
            if path.name not in ("samples", "sweep", "samples.npz")
        ]
        if any(not name.startswith(".") and not name.endswith((".png", ".svg")) for name in foreign):
            raise UserError(
                f"--out must be new, empty or the folder of an evaluation, got {out}. Choose another folder."
            )
        return None
    before = read_record(out)
    # a model that was moved is the same model
    if replace(before.subject, name=subject.name) != subject:
        raise UserError(
            f"{out} holds the evaluation of {before.subject.name} with other weights or options. "
            "Choose another --out; nothing is overwritten."
        )
    if before.protocol != protocol or list(before.sweep) != sweep or before.measures != measures:
        logger.info("%s is scored again: it was measured in another way before", out)
        return None
    return before


def finish(record: EvaluationRecord, out: Path) -> None:
    """Write the report, and say the first scores and where the others are."""
    write_report(record, out)
    for warning in record.warnings:
        logger.info("%s", warning)
    for score in record.scores[:4]:
        logger.info("%s", _line(score))
    logger.info(
        "N = %d, n = %d; all scores: %s", record.protocol.num_samples, record.protocol.chunk_images, out / "report.md"
    )


def _line(score: Score) -> str:
    beside = [
        f"{name} {value:.4g}"
        for name, value in (("floor", score.floor), ("ceiling", score.ceiling))
        if value is not None
    ]
    return f"{score.name}: {score.value:.4g}" + (f" ({', '.join(beside)})" if beside else "")
