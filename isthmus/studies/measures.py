"""What both studies measure: evaluations under one protocol, held-out images rebuilt or edited, the cost of a step."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from isthmus.data.opening import open_source
from isthmus.data.source import WantedColumns
from isthmus.errors import UserError
from isthmus.evaluation.classes import Balance, NearestClassMean, SampleClasses, choose_classes
from isthmus.evaluation.evaluate import evaluate_model
from isthmus.evaluation.features import FeatureNetwork, Features, extract_features, feature_network
from isthmus.evaluation.guards import check_duplicates
from isthmus.evaluation.held_out import HELD_OUT_LIMIT, LITE0, PSNR, ReconstructionMeter, as_floats
from isthmus.evaluation.images import some
from isthmus.evaluation.record import EvaluationRecord, read_record
from isthmus.evaluation.reference import DataSplits, open_splits
from isthmus.evaluation.scores import RealImages, RealSides, SampleScores
from isthmus.evaluation.statistics import Gaussian, mean_interval
from isthmus.nn.perceptual import Lite0Distance
from isthmus.nn.shapes import Images
from isthmus.pipelines.labels import Label, names_in_order
from isthmus.pipelines.loading import AnyPipeline, choose_device
from isthmus.pipelines.options import parse_guidance
from isthmus.studies.experiments import Values
from isthmus.studies.options import BALANCE
from isthmus.studies.tables import Claim, Reading, student_95
from isthmus.training.config import Run

Timed = Callable[[], object]


def interleaved_seconds(runs: Mapping[str, Timed], device: torch.device, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in each round, all runs in turn: what else the machine does hits them alike.

    A first round that does not count warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(run: Timed, device: torch.device) -> int:
    """Bytes that tensors of a run hold at most beyond those that were there before; run it once before, to warm up.

    On CPU every allocation is counted by torch's profiler, so the number does not depend on what the system's
    allocator keeps; buffers inside libraries of kernels are not counted. On CUDA it is the allocator's own peak.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    # the profiler's own library announces its start and end on stderr otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None, "the profile has ended"
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  the stub lacks it
        peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def splits_of(pipeline: AnyPipeline, setting: EvaluationSetting) -> DataSplits:
    """Training and held-out images, as `isthmus evaluate` opens them for this model."""
    names = names_in_order(pipeline.class_names)
    return open_splits(
        setting.data,
        image_size=pipeline.image_size,
        classes=setting.classes or (),
        wanted=names,
        columns=setting.columns,
    )


@dataclass(frozen=True, eq=False)
class SampleProtocol:
    """How samples of one model are scored, by the protocol of `isthmus evaluate`.

    Attributes:
        real: what they are measured against.
        classes: of the samples, fixed by their numbers.
    """

    real: RealImages
    classes: SampleClasses

    @classmethod
    def of(cls, pipeline: AnyPipeline, setting: EvaluationSetting) -> "SampleProtocol":
        """That of a setting.

        Raises:
            UserError: the data do not fit the model, or there are too few images.
        """
        network = feature_network("lite0", device=choose_device(setting.device))
        splits, size = splits_of(pipeline, setting), (pipeline.image_size, pipeline.image_size)
        real = RealImages.of(network, splits, size=size, sides=setting.real_sides)
        return cls(real, choose_classes(pipeline, splits, setting.num, setting.balance))

    def scored(self, features: Features, digests: Sequence[str]) -> SampleScores:
        """Scores of samples, and what the guards say of them and of their `pixel_digest`s."""
        labels = self.classes.labels if self.classes.names else None
        found, warning = self.real.scores(features, labels, self.classes.names), check_duplicates(digests)
        return found if warning is None else replace(found, warnings=(*found.warnings, warning))

    def values(self, by: str, found: Mapping[str, SampleScores]) -> Values:
        """What tables read of several sets of samples: protocol, warnings, and under `by` the scores of every set."""
        protocol = self.real.protocol(len(self.classes.labels), self.classes.words)
        said = dict.fromkeys(warning for scored in found.values() for warning in scored.warnings)
        scores = {name: {score.name: asdict(score) for score in scored.scores} for name, scored in found.items()}
        return {"protocol": asdict(protocol), "warnings": list(said), by: scores}


BATCH = 32
"""Images that are worked on at once."""

Pictures = UInt8[np.ndarray, "_ _ _ 3"]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out images, and a judge of classes fitted on training images.

    Attributes:
        images: 0..255.
        labels: class of the data; None where it has none.
        model_ids: the model's id of every image's class; None where no class is given.
        network: features of the judge and of the distances.
        judge: None where there are no classes.
        headline: features of `images` in the network's first space.
        perceptual: distance of reconstructions.
    """

    images: Pictures
    labels: Int[np.ndarray, " n"] | None
    model_ids: Sequence[Label]
    network: FeatureNetwork
    judge: NearestClassMean | None
    headline: np.ndarray
    perceptual: Lite0Distance = field(default_factory=Lite0Distance)

    @classmethod
    def of(cls, pipeline: AnyPipeline, setting: EvaluationSetting) -> "HeldOut":
        """The held-out images of a setting, at most `HELD_OUT_LIMIT` of them.

        Raises:
            UserError: the data do not fit the model.
        """
        splits = splits_of(pipeline, setting)
        network = feature_network("lite0", device=choose_device(setting.device))
        space = next(iter(network.spaces))
        chosen = some(splits.held_out, HELD_OUT_LIMIT)
        images, labels, judge = np.stack(list(chosen)), None, None
        ids = choose_classes(pipeline, splits, 1, "uniform").ids
        if splits.class_names and splits.train.labels is not None and chosen.labels is not None:
            labels = chosen.labels
            judge = NearestClassMean.fit(extract_features(network, splits.train)[space], splits.train.labels)
        model_ids = [ids[label] for label in labels] if ids and labels is not None else [None] * len(images)
        return cls(images, labels, model_ids, network, judge, extract_features(network, images)[space])

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> Iterator[tuple[int, Images]]:
        """Number of the first image and images in [-1, 1]."""
        for start in range(0, len(self), BATCH):
            yield start, as_floats(self.images[start : start + BATCH])

    def compared(self, rebuilt: Pictures) -> Values:
        """What reconstructions of all images keep: means over images with the ends of their 95 % interval, and r-FD."""
        meter = ReconstructionMeter(self.network, self.perceptual, None)
        for start in range(0, len(self), BATCH):
            meter.update(self.images[start : start + BATCH], rebuilt[start : start + BATCH])
        scores = meter.scores(Gaussian.of(self.headline))
        space = next(iter(self.network.spaces))
        values = {
            PSNR: mean_and_interval(scores.values[PSNR]),
            LITE0: mean_and_interval(scores.values[LITE0]),
            f"r-FD-{space}": [scores.frechet],
        }
        right = self.right(extract_features(self.network, rebuilt)[space])
        return values if right is None else values | {"class accuracy (nearest mean)": mean_and_interval(right)}

    def right(self, rows: np.ndarray) -> Bool[np.ndarray, " n"] | None:
        """Which images the judge puts into their class; None where there are no classes."""
        return None if self.judge is None or self.labels is None else self.judge.predict(rows) == self.labels
