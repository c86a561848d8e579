"""Evaluations of a study: one protocol for all models of a table, and their scores as readings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from isthmus.data.opening import open_source
from isthmus.data.source import WantedColumns
from isthmus.errors import UserError
from isthmus.evaluation.evaluate import evaluate_model
from isthmus.evaluation.intervals import mean_interval
from isthmus.evaluation.model_samples import Balance
from isthmus.evaluation.protocol import EvaluationRecord, read_record
from isthmus.evaluation.real_side import RealSides
from isthmus.generation.options import parse_guidance
from isthmus.studies.experiments import Values
from isthmus.studies.options import BALANCE
from isthmus.studies.readings import Reading, student_95
from isthmus.studies.tables import Claim
from isthmus.training.config import Run

KERNEL, FRECHET = "KD-lite0-192", "FD-lite0-192"
"""The kernel distance leads where n < 1,000; the Frechet distance is what the papers' FID is on other features."""

SAMPLE_SCORES = (KERNEL, FRECHET, "class accuracy (nearest mean)", "memorised share", "nearer than held-out")
"""Scores of samples that the tables show; the evaluations' own reports have the others."""

_NORMAL_95 = 1.96
_LOOK_PX = 32


@dataclass(frozen=True, kw_only=True)
class EvaluationSetting:
    """What all evaluations of a study share.

    Attributes:
        data: as for `open_source`.
        classes: of the data; None is all.
        columns: of an hf: table.
        num: samples per model and setting.
        batch_size: images drawn at once; None estimates what fits.
        device: where networks run.
        balance: how often samples have each class; "uniform" for images without any.
        real_sides: what was measured of the real images, which all evaluations share.
    """

    data: str
    classes: tuple[str, ...] | None
    num: int
    columns: WantedColumns = WantedColumns()
    batch_size: int | None = None
    device: str = "cpu"
    balance: Balance = BALANCE
    real_sides: RealSides = field(default_factory=RealSides, compare=False, repr=False)

    @classmethod
    def of(cls, run: Run, *, num: int, batch_size: int | None, device: str) -> "EvaluationSetting":
        """Models of `run` are judged on its data and classes."""
        # the size is that at which drawings are rendered; any will do to see whether they have classes
        columns = WantedColumns(run.image_column, run.label_column)
        labelled = open_source(
            run.data, image_size=_LOOK_PX, split="val", classes=run.classes, columns=columns
        ).class_names
        return cls(
            data=run.data,
            classes=run.classes,
            columns=columns,
            num=num,
            batch_size=batch_size,
            device=device,
            balance=BALANCE if labelled else "uniform",
        )


def evaluation_values(
    model: Path, folder: Path, setting: EvaluationSetting, *, seed: int, guidances: Sequence[str]
) -> Values:
    """Evaluate a model as `isthmus evaluate` does, with each of `guidances`; what was drawn earlier is used again.

    Returns:
        protocol, warnings, held-out scores and curves of the model, and its sample scores by guidance.
    """
    first, *others = guidances
    evaluate_model(
        str(model),
        folder,
        data=setting.data,
        classes=setting.classes or (),
        columns=setting.columns,
        num=setting.num,
        seed=seed,
        options={"guidance_scale": parse_guidance(first)},
        steering={},
        balance=setting.balance,
        sweep=[parse_guidance(guidance) for guidance in others],
        batch_size=setting.batch_size,
        device=setting.device,
        real_sides=setting.real_sides,
    )
    return record_values(read_record(folder), guidances)


def record_values(record: EvaluationRecord, guidances: Sequence[str]) -> Values:
    """The parts of a record that tables read, in JSON values."""
    swept = [record.scores, *record.sweep.values()]
    return {
        "protocol": asdict(record.protocol),
        "warnings": list(record.warnings),
        "by_guidance": {
            guidance: {score.name: asdict(score) for score in scores}
            for guidance, scores in zip(guidances, swept, strict=True)
        },
        "held_out": {score.name: asdict(score) for score in record.held_out},
        "curves": {curve.name: {"positions": curve.positions, "values": curve.values} for curve in record.curves},
    }


def score_reading(score: Mapping[str, Any]) -> Reading:
    """A score with its own 95 % interval.

    Its own ends where there are any, else 1.96 standard errors, else the interval of a mean over disjoint chunks.

    >>> score_reading({"value": 3.0, "low": None, "high": None, "error": 0.5, "deviation": None, "measurements": 1})
    Reading(value=3.0, low=2.02, high=3.98)
    """
    value = math.nan if score["value"] is None else float(score["value"])
    low, high, error, deviation = (score[name] for name in ("low", "high", "error", "deviation"))
    if low is not None and high is not None:
        return Reading(value, low, high)
    if error is not None:
        return Reading.around(value, _NORMAL_95 * error)
    if deviation is not None and score["measurements"] > 1:
        count = score["measurements"]
        return Reading.around(value, student_95(count - 1) * deviation / math.sqrt(count))
    return Reading(value)


def mean_and_interval(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> list[float]:
    """Mean over images and both ends of its 95 % interval (`mean_interval`)."""
    interval = mean_interval(values)
    return [interval.mean, interval.low, interval.high]


def sample_readings(values_by_seed: Mapping[int, Values], guidance: str) -> dict[str, dict[int, Reading]]:
    """Readings of the sample scores by column, from the evaluations of several training seeds."""
    return score_readings({seed: values["by_guidance"][guidance] for seed, values in values_by_seed.items()})


def score_readings(scores_by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, Reading]]:
    """Readings of the `SAMPLE_SCORES` that were measured, by column."""
    columns: dict[str, dict[int, Reading]] = {}
    for seed, scores in scores_by_seed.items():
        for name in SAMPLE_SCORES:
            if name in scores:
                columns.setdefault(name, {})[seed] = score_reading(scores[name])
    return columns


def held_out_readings(values_by_seed: Mapping[int, Values], name: str) -> dict[int, Reading]:
    """Readings of a held-out score by training seed."""
    return {
        seed: score_reading(values["held_out"][name])
        for seed, values in values_by_seed.items()
        if name in values["held_out"]
    }


def real_image_cells(values: Values, guidance: str, side: str) -> dict[str, dict[int, Reading]]:
    """The `floor` or `ceiling` beside the sample scores: what real, or ruined, images score."""
    found = values["by_guidance"][guidance]
    return {
        name: {0: Reading(float(found[name][side]))}
        for name in SAMPLE_SCORES
        if name in found and found[name][side] is not None
    }


def sample_facts(values: Values, guidance: str, seeds: Sequence[int]) -> dict[str, str]:
    """What stands beside every number of samples."""
    protocol = values["protocol"]
    return {
        "guidance": guidance,
        "N": str(protocol["num_samples"]),
        "n": str(protocol["chunk_images"]),
        "seeds": ", ".join(map(str, seeds)),
    }


def by_both_distances(*claims: Claim) -> tuple[Claim, ...]:
    """Claims about a FID are judged by the kernel distance, then by the Frechet distance; others as they are."""
    judged = []
    for claim in claims:
        columns = (KERNEL, FRECHET) if claim.column == FRECHET else (claim.column,)
        judged += [replace(claim, column=column) for column in columns]
    return tuple(judged)


def one_protocol(found: Sequence[Values]) -> Values:
    """How all of `found` were measured.

    Raises:
        UserError: in different ways, so that they do not stand in one table.
    """
    first, *others = (values["protocol"] for values in found)
    for other in others:
        differences = [name.replace("_", " ") for name in first if first[name] != other[name]]
        if differences:
            raise UserError(
                "two experiments of one table were measured in different ways, so their scores do not compare: they "
                f"differ in {', '.join(differences)}. Remove the folder of the older one, or choose another --out."
            )
    return first


def protocol_words(found: Sequence[Values]) -> str:
    """How the samples of a table were measured. Raises `UserError` where two were measured in different ways."""
    protocol = one_protocol(found)
    return (
        f"N samples per row and seed ({protocol['balance']}), n images per distance against n of "
        f"{protocol['reference']}; features {protocol['features']} ({protocol['features_sha256'][:12]}), "
        f"{protocol['image_size']} px. Floor: real images disjoint from the reference (of class accuracy: held-out "
        "images); ceiling: real images blurred to almost their mean colour (of class accuracy: chance; of memorised "
        "shares and of what is nearer than held-out images: training images as training sees them, which is how much "
        "of true copies these two can see)."
    )


def warning_notes(found: Sequence[Values]) -> tuple[str, ...]:
    """What the guards said of these samples, each sentence once."""
    return tuple(f"Warning: {said}" for said in dict.fromkeys(one for values in found for one in values["warnings"]))
