"""The folder of an evaluation: whether it holds a finished one, and what is written at the end."""

import logging
from dataclasses import replace
from pathlib import Path

from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import AdmStatistics, StatisticsOrigin, write_statistics
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.generation_scores import Features
from isthmus.evaluation.protocol import (
    RECORD,
    EvaluationRecord,
    Protocol,
    Score,
    Subject,
    outdated_subject,
    read_record,
)
from isthmus.evaluation.report import REPORT_FILES, write_report
from isthmus.evaluation.statistics import GaussianStatistics
from isthmus.files import contents

logger = logging.getLogger("isthmus")

SAMPLES_FOLDER, SWEEP_FOLDER = "samples", "sweep"
NPZ, STATISTICS = "samples.npz", "statistics.npz"

# what an evaluation writes: a folder that holds nothing else may be scored (again)
_OURS = frozenset((SAMPLES_FOLDER, SWEEP_FOLDER, NPZ, STATISTICS, *REPORT_FILES))


def scored_record(out: Path, protocol: Protocol, subject: Subject, *, sweep: list[str]) -> EvaluationRecord | None:
    """The record of an earlier run that scored the same samples in the same way; None where they are to be scored.

    Its `measures` tell what was measured on held-out images; they are empty where that stage did not end.

    Raises:
        UserError: `out` is a file, or holds the evaluation of something else, or other things.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, got the file {out}. Choose another name.")
    if not (out / RECORD).is_file():
        names = [path.name for path in contents(out)]
        # a killed process may have left a .partial
        foreign = [name for name in names if name not in _OURS and not name.endswith(".partial")]
        if foreign:
            raise UserError(
                f"--out must be new, empty or the folder of an evaluation, got {out} with {foreign[0]} in it. "
                "Choose another folder."
            )
        return None
    outdated = outdated_subject(out)
    before = None if outdated is not None else read_record(out)
    measured = outdated if before is None else before.subject
    assert measured is not None, "a record is outdated or it is not"
    # a model that was moved is the same model
    if replace(measured, name=subject.name) != subject:
        raise UserError(
            f"{out} holds the evaluation of {measured.name} with other weights or options. "
            "Choose another --out; nothing is overwritten."
        )
    if before is None:
        logger.info("%s is scored again: an earlier version of Isthmus measured it", out)
        return None
    if before.protocol != protocol or list(before.sweep) != sweep:
        logger.info("%s is scored again: it was measured in another way before", out)
        return None
    return before


def write_sample_statistics(path: Path, features: Features, network: FeatureNetwork) -> None:
    """Write mean and covariance of the features in the headline space, as --reference reads them, and their origin."""
    space, width = next(iter(network.spaces.items()))
    statistics = GaussianStatistics(width)
    statistics.update(features[space])
    origin = StatisticsOrigin(space, network.weights_sha256, network.preprocessing, statistics.count)
    write_statistics(path, AdmStatistics(statistics.mean.numpy(), statistics.covariance.numpy(), origin))


def remove_by_products(out: Path) -> None:
    """Delete samples.npz and statistics.npz of an earlier scoring: beside a new record they would be of other samples.

    What a command asks for is written again.
    """
    for name in (NPZ, STATISTICS):
        (out / name).unlink(missing_ok=True)


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
