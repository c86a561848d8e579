"""What both studies measure: evaluations under one protocol, held-out images rebuilt or edited, the cost of a step."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource, WantedColumns
from isthmus.errors import UserError
from isthmus.evaluation.classes import Balance, NearestClassMean, SampleClasses, choose_classes
from isthmus.evaluation.evaluate import evaluate_model
from isthmus.evaluation.features import FeatureNetwork, extract_features, feature_network
from isthmus.evaluation.guards import check_duplicates
from isthmus.evaluation.held_out import HELD_OUT_LIMIT, ReconstructionMeter, as_floats
from isthmus.evaluation.images import some
from isthmus.evaluation.record import Score, read_record
from isthmus.evaluation.reference import DataSplits, RealSides, open_splits
from isthmus.evaluation.sample_scores import RealImages, SampleScores
from isthmus.evaluation.scores import Features
from isthmus.evaluation.statistics import Gaussian, mean_interval
from isthmus.nn.perceptual import Lite0Distance
from isthmus.nn.shapes import Images
from isthmus.pipelines.labels import Label, names_in_order
from isthmus.pipelines.loading import AnyPipeline, choose_device, load_pipeline
from isthmus.pipelines.options import parse_guidance
from isthmus.studies.experiments import Experiment, Values
from isthmus.studies.options import BALANCE
from isthmus.studies.tables import (
    FRECHET,
    KERNEL,
    Found,
    Reading,
    Readings,
    Row,
    Setting,
    by_column,
    student_half_width,
)
from isthmus.training.config import Run, run_to_json
from isthmus.training.run import column, read_log

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


CLASS, PSNR, DISTANCE = "class accuracy (nearest mean)", "PSNR, dB", "lite0 distance"
SAMPLE_SCORES = (KERNEL, FRECHET, CLASS, "memorised share", "nearer than held-out")
"""Scores of samples that the tables show; the evaluations' own reports have the others."""

_NORMAL_95 = 1.96
_LOOK_PX = 32


@dataclass(frozen=True)
class Lab(Generic[Setting]):
    """What every experiment of a study works with.

    Attributes:
        setting: of the study.
        folder: of the study; each experiment has one of its name in it.
        real_sides: what was measured of the real images, which all evaluations share.
    """

    setting: Setting
    folder: Path
    real_sides: RealSides = field(default_factory=RealSides)

    def run_folder(self, experiment: str) -> Path:
        """Where a training writes its model."""
        return self.folder / experiment / "run"

    def pipeline(self, experiment: str) -> Any:
        """The model that a training wrote, of the family of the study."""
        return load_pipeline(str(self.run_folder(experiment)), device=choose_device(self.setting.device))

    @property
    def columns(self) -> WantedColumns:
        """Of an hf: table."""
        return WantedColumns(self.setting.prior.image_column, self.setting.prior.label_column)

    def held_out(self, image_size: int) -> ImageSource:
        """The held-out images of the data."""
        run = self.setting.prior
        return open_source(run.data, image_size=image_size, split="val", classes=run.classes, columns=self.columns)

    def splits(self, pipeline: AnyPipeline) -> DataSplits:
        """Training and held-out images, as `isthmus evaluate` opens them for this model."""
        return open_splits(
            self.setting.prior.data,
            image_size=pipeline.image_size,
            classes=self.setting.prior.classes or (),
            wanted=names_in_order(pipeline.class_names),
            columns=self.columns,
        )

    @cached_property
    def balance(self) -> Balance:
        """How often samples have each class; "uniform" for images without any."""
        # the size is that at which drawings are rendered; any will do to see whether they have classes
        return BALANCE if self.held_out(_LOOK_PX).class_names else "uniform"

    def network(self) -> FeatureNetwork:
        """Features of all scores."""
        return feature_network("lite0", device=choose_device(self.setting.device))


def run_settings(run: Run, *filled_in: str) -> Values:
    """A run as settings of an experiment, without what the study fills in."""
    left_out = ("out", "tokenizer", "token_cache", *filled_in)
    return {name: value for name, value in run_to_json(run).items() if name not in left_out}


def bits_by_step(run: Run) -> Values:
    """Held-out bits per token of a finished training."""
    steps, bits = column(read_log(run.out / "log.jsonl"), "val/bits_per_token")
    return {"steps": steps, "bits_per_token": bits}


def evaluation(lab: Lab[Any], experiment: Experiment) -> Values:
    """Evaluate the model that the experiment reads as `isthmus evaluate` does, with each of its guidances.

    What was drawn earlier is used again.

    Returns:
        protocol, warnings, held-out scores and curves of the model, and its sample scores by guidance.
    """
    setting, guidances = lab.setting, experiment.settings["guidances"]
    first, *others = map(parse_guidance, guidances)
    place = lab.folder / experiment.name / "evaluation"
    evaluate_model(
        str(lab.run_folder(experiment.after[0])),
        place,
        data=setting.prior.data,
        classes=setting.prior.classes or (),
        columns=lab.columns,
        num=setting.num,
        seed=experiment.settings["seed"],
        options={"guidance_scale": first},
        steering={},
        balance=lab.balance,
        sweep=others,
        batch_size=setting.batch_size,
        device=setting.device,
        real_sides=lab.real_sides,
    )
    record = read_record(place)
    swept = zip(guidances, [record.scores, *record.sweep.values()], strict=True)
    return {
        "protocol": asdict(record.protocol),
        "warnings": list(record.warnings),
        "by_guidance": {guidance: _written(scores) for guidance, scores in swept},
        "held_out": _written(record.held_out),
        "curves": {curve.name: {"positions": curve.positions, "values": curve.values} for curve in record.curves},
    }


def _written(scores: Sequence[Score]) -> Values:
    return {score.name: asdict(score) for score in scores}


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
        return Reading.around(value, student_half_width(deviation, score["measurements"]))
    return Reading(value)


def mean_and_interval(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> list[float]:
    """Mean over images and both ends of its 95 % interval (`mean_interval`)."""
    interval = mean_interval(values)
    return [interval.mean, interval.low, interval.high]


def sample_row(
    found: Found[Any],
    name: str,
    experiment: str,
    *path: str,
    guidance: str,
    facts: Mapping[str, str] | None = None,
    cells: Mapping[str, Readings] | None = None,
) -> Row:
    """The scores of samples that an experiment found at `path`, with what stands beside every number of samples.

    Args:
        found: by the study.
        name: of the row.
        experiment: without its seed.
        path: in what it found; none is `by_guidance` at `guidance`.
        guidance: that the samples were drawn with.
        facts: that stand before those of samples.
        cells: that stand behind the scores.
    """
    protocol = next(iter(found.by_seed(experiment, "protocol").values()))
    beside = {"guidance": guidance, "N": str(protocol["num_samples"]), "n": str(protocol["chunk_images"])}
    measured = by_column(found.by_seed(experiment, *(path or ("by_guidance", guidance))), score_reading)
    scores = {column: measured[column] for column in SAMPLE_SCORES if column in measured}
    return Row(
        name=name,
        facts={**(facts or {}), **beside, "seeds": found.setting.seed_words},
        cells={**scores, **(cells or {})},
    )


def held_out_row(
    found: Found[Any], name: str, experiment: str, *path: str | int, column: str = "", once: bool = False
) -> Row:
    """What an experiment found at `path` of held-out images: by column, a value and the ends of its interval if any.

    Args:
        found: by the study.
        name: of the row.
        experiment: without its seed.
        path: in what it found.
        column: of the value, where it is a single one.
        once: the first seed speaks for all, since no training decides it.
    """
    by_seed = {seed: {column: at} if column else at for seed, at in found.by_seed(experiment, *path).items()}
    if once:
        by_seed = {0: next(iter(by_seed.values()))}
    images = found.all_of(experiment)[0]["images"]
    cells = by_column(by_seed, lambda written: Reading(*written))
    return Row(name=name, facts={"images": str(images), "seeds": found.setting.seed_words}, cells=cells)


def real_rows(scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Floor and ceiling beside these sample scores: what real, and ruined, images score."""
    names = [name for name in SAMPLE_SCORES if name in scores]
    return [
        Row(
            name=side,
            cells={name: {0: Reading(float(scores[name][side]))} for name in names if scores[name][side] is not None},
        )
        for side in ("floor", "ceiling")
    ]


def protocol_words(found: Sequence[Values]) -> str:
    """How the samples of a table were measured.

    Raises:
        UserError: in different ways, so that they do not stand in one table.
    """
    protocol, *others = (values["protocol"] for values in found)
    for other in others:
        differences = [name.replace("_", " ") for name in protocol if protocol[name] != other[name]]
        if differences:
            raise UserError(
                "two experiments of one table were measured in different ways, so their scores do not compare: they "
                f"differ in {', '.join(differences)}. Remove the folder of the older one, or choose another --out."
            )
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
    def of(cls, pipeline: AnyPipeline, lab: Lab[Any]) -> "SampleProtocol":
        """That of the study. Raises `UserError` where the data do not fit the model, or there are too few images."""
        splits, size = lab.splits(pipeline), (pipeline.image_size, pipeline.image_size)
        real = RealImages.of(lab.network(), splits, size=size, sides=lab.real_sides)
        return cls(real, choose_classes(pipeline, splits, lab.setting.num, lab.balance))

    def scored(self, features: Features, digests: Sequence[str]) -> SampleScores:
        """Scores of samples, and what the guards say of them and of their `pixel_digest`s."""
        labels = self.classes.labels if self.classes.names else None
        found, warning = self.real.scores(features, labels, self.classes.names), check_duplicates(digests)
        return found if warning is None else replace(found, warnings=(*found.warnings, warning))

    def values(self, by: str, found: Mapping[str, SampleScores]) -> Values:
        """What tables read of several sets of samples: protocol, warnings, and under `by` the scores of every set."""
        protocol = self.real.protocol(len(self.classes.labels), self.classes.words)
        said = dict.fromkeys(warning for scored in found.values() for warning in scored.warnings)
        scores = {name: _written(scored.scores) for name, scored in found.items()}
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
    def of(cls, pipeline: AnyPipeline, lab: Lab[Any]) -> "HeldOut":
        """Those of the study, at most `HELD_OUT_LIMIT`. Raises `UserError` where the data do not fit the model."""
        splits, network = lab.splits(pipeline), lab.network()
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
        scores, space = meter.scores(Gaussian.of(self.headline)), next(iter(self.network.spaces))
        return {
            PSNR: mean_and_interval(scores.psnr),
            DISTANCE: mean_and_interval(scores.perceptual),
            f"r-FD-{space}": [scores.frechet],
            **self.class_accuracy(extract_features(self.network, rebuilt)[space]),
        }

    def class_accuracy(self, rows: np.ndarray) -> Values:
        """Share of images that the judge puts into their class, from their features; nothing without classes."""
        if self.judge is None or self.labels is None:
            return {}
        return {CLASS: mean_and_interval(self.judge.predict(rows) == self.labels)}
