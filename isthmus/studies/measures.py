"""What all studies measure: evaluations under one protocol, held-out images rebuilt or edited, the cost of a step."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource, WantedColumns
from isthmus.evaluation.classes import Balance, NearestClassMean, choose_classes
from isthmus.evaluation.evaluate import evaluate_model, samples_folder
from isthmus.evaluation.features import (
    FeatureNetwork,
    Features,
    extract_features,
    feature_network,
    sample_features,
)
from isthmus.evaluation.guards import check_duplicates
from isthmus.evaluation.held_out import HELD_OUT_LIMIT, LITE0, PSNR, ReconstructionMeter, as_floats
from isthmus.evaluation.images import some
from isthmus.evaluation.jackknife import Parts, error_of, frechet_parts, kernel_parts, mean_parts, rebuilt_parts
from isthmus.evaluation.record import Score, read_record
from isthmus.evaluation.reference import DataSplits, open_splits
from isthmus.evaluation.scores import RealImages, RealSides
from isthmus.evaluation.statistics import Gaussian, mean_interval
from isthmus.nn.perceptual import Lite0Distance
from isthmus.nn.shapes import Images
from isthmus.pipelines.labels import Label, names_in_order
from isthmus.pipelines.loading import AnyPipeline, choose_device, load_pipeline
from isthmus.pipelines.options import guidance_text, parse_guidance
from isthmus.samples import read
from isthmus.studies.experiments import Experiment, Values
from isthmus.studies.options import BALANCE, SrddSetting, TextSetting
from isthmus.studies.tables import CLASS, FRECHET, KERNEL, NORMAL_95, Setting
from isthmus.training.images import wanted_columns, wanted_drawings

Timed = Callable[[], object]


def timing_experiment(
    name: str,
    work: Callable[[Any, Experiment], Values],
    setting: SrddSetting | TextSetting,
    *,
    seconds: float,
    **compared: Sequence[str],
) -> Experiment:
    """Trained priors against each other, at the first seed; `compared` are their names, by what a study calls them."""
    seed, (names,) = setting.seeds[0], compared.values()
    shared = {"seed": seed, "rounds": setting.rounds, "device": setting.device, "threads": setting.threads}
    return Experiment(
        name=name,
        kind="cost",
        work=work,
        settings={**{word: list(some) for word, some in compared.items()}, **shared},
        after=tuple(f"prior-{one}-seed{seed}" for one in names),
        seconds=seconds,
    )


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


# the size at which drawings are rendered; any will do to see whether images are there, which, and of what classes
_LOOK_PX = 32


@dataclass(frozen=True)
class Lab(Generic[Setting]):
    """What every experiment of a study works with; `real_sides`, measured of real images, serves all."""

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
        return wanted_columns(self.setting.prior)

    def images(self, split: str, image_size: int = _LOOK_PX) -> ImageSource:
        """The images of the data; raises `UserError` where they cannot be used."""
        run = self.setting.prior
        return open_source(
            run.data,
            image_size=image_size,
            split=split,
            classes=run.classes,
            columns=self.columns,
            max_images=wanted_drawings(run),
        )

    def splits(self, pipeline: AnyPipeline) -> DataSplits:
        """Training and held-out images, as `isthmus evaluate` opens them for this model."""
        return open_splits(
            self.setting.prior.data,
            image_size=pipeline.image_size,
            classes=self.setting.prior.classes or (),
            wanted=names_in_order(pipeline.class_names),
            columns=self.columns,
            max_images=wanted_drawings(self.setting.prior),
            num_samples=self.setting.num,
        )

    @cached_property
    def balance(self) -> Balance:
        """How often samples have each class; "uniform" for images without any."""
        return BALANCE if self.images("val").class_names else "uniform"

    def network(self) -> FeatureNetwork:
        """Of all scores."""
        return feature_network("lite0", device=choose_device(self.setting.device))


def evaluation(lab: Lab[Any], experiment: Experiment) -> Values:
    """Evaluate the model that the experiment reads as `isthmus evaluate` does, with each of its guidances.

    What was drawn earlier is used again. `attributes` of the experiment are read from the samples, where it has any:
    how often each was asked for and found is in the list of that name.
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
        max_images=wanted_drawings(setting.prior),
        num=setting.num,
        seed=experiment.settings["seed"],
        options={"guidance_scale": first},
        steering={},
        balance=lab.balance,
        attributes=experiment.settings.get("attributes", ()),
        sweep=others,
        batch_size=setting.batch_size,
        device=setting.device,
        real_sides=lab.real_sides,
    )
    record, scorer = read_record(place), SampleScorer(lab.pipeline(experiment.after[0]), lab)
    folders = [samples_folder(place), *(samples_folder(place, guidance_text(one)) for one in others)]
    swept = zip(guidances, folders, [record.scores, *record.sweep.values()], strict=True)
    return {
        "protocol": asdict(record.protocol),
        "warnings": list(record.warnings),
        "by_guidance": {
            guidance: _written(scores, scorer.parts(sample_features(scorer.real.network, read(folder, setting.num))))
            for guidance, folder, scores in swept
        },
        "attributes": [] if record.readings is None else list(map(asdict, record.readings.counts)),
        "held_out": _written(record.held_out),
        "curves": {curve.name: {"positions": curve.positions, "values": curve.values} for curve in record.curves},
    }


def _written(scores: Sequence[Score], parts: Mapping[str, Parts] | None = None) -> Values:
    return {score.name: {**asdict(score), "parts": (parts or {}).get(score.name, [])} for score in scores}


Written = list[Any]
"""A value, the ends of its 95 % interval and what groups of images say (`Reading.written`)."""


def mean_and_interval(values: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> Written:
    """Mean over images (`mean_interval`)."""
    interval = mean_interval(values)
    return [interval.mean, interval.low, interval.high, mean_parts(values)]


class SampleScorer:
    """Scores samples of one model by the protocol of `isthmus evaluate`: against `real`, with `classes`.

    Raises `UserError` where the data do not fit the model, or there are too few images.
    """

    def __init__(self, pipeline: AnyPipeline, lab: Lab[Any]):
        splits, size = lab.splits(pipeline), (pipeline.image_size, pipeline.image_size)
        self.real = RealImages.of(lab.network(), splits, size=size, sides=lab.real_sides)
        self.classes = choose_classes(pipeline, splits, lab.setting.num, lab.balance)

    def parts(self, features: Features) -> dict[str, Parts]:
        """What groups of the samples say of their scores, by name; nothing of a distance that is a mean over chunks."""
        space, labels = self.real.network.headline, self.classes.labels
        rows, measured, found = features[space], self.real.measured(len(features[space])), {}
        if measured.reference is not None and len(measured.reference) == len(rows):
            reference = measured.reference.reference[space]
            found = {KERNEL: kernel_parts(rows, reference), FRECHET: frechet_parts(rows, Gaussian.of(reference))}
        if self.classes.names and measured.training is not None:
            judge = NearestClassMean.fit(measured.training.rows, measured.training.labels)
            found[CLASS] = mean_parts(judge.predict(rows) == labels)
        return found

    def values(self, by: str, sets: Mapping[str, tuple[Features, Sequence[str]]]) -> Values:
        """Protocol, warnings, and under `by` the scores of several sets of samples (features and `pixel_digest`s)."""
        classes, scores, warnings = self.classes, {}, []
        for name, (features, digests) in sets.items():
            found = self.real.scores(features, classes.labels if classes.names else None, classes.names)
            scores[name], warnings = (
                _written(found.scores, self.parts(features)),
                [*warnings, *found.warnings, check_duplicates(digests)],
            )
        protocol = self.real.protocol(len(classes.labels), classes.words)
        return {"protocol": asdict(protocol), "warnings": [*filter(None, dict.fromkeys(warnings))], by: scores}


BATCH = 32
"""Images that are worked on at once."""

Pictures = UInt8[np.ndarray, "_ _ _ 3"]


class HeldOut:
    """Held-out images (0..255), at most `HELD_OUT_LIMIT`, and a judge of classes fitted on training images.

    Raises `UserError` where the data do not fit the model.
    """

    def __init__(self, pipeline: AnyPipeline, lab: Lab[Any]):
        self._lab, self._splits, self._network = lab, lab.splits(pipeline), lab.network()
        self._perceptual = Lite0Distance()
        chosen = some(self._splits.held_out, HELD_OUT_LIMIT)
        self.images: Pictures = np.stack(list(chosen))
        self.model_ids: Sequence[Label] = [None] * len(self.images)
        self._labels = chosen.labels if self._splits.class_names else None
        if self._labels is not None:
            ids = choose_classes(pipeline, self._splits, 1, "uniform").ids
            self.model_ids = [ids[label] for label in self._labels] if ids else self.model_ids

    @cached_property
    def headline(self) -> np.ndarray:
        """Features in the headline space."""
        return extract_features(self._network, self.images)[self._network.headline]

    @cached_property
    def _judge(self) -> NearestClassMean:
        size = (self.images.shape[1], self.images.shape[2])
        real = RealImages.of(self._network, self._splits, size=size, sides=self._lab.real_sides)
        training = real.measured(self._lab.setting.num).training
        assert training is not None, "there is a data set"
        return NearestClassMean.fit(training.rows, training.labels)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> Iterator[tuple[slice, Images, list[Label]]]:
        """Which images, these in [-1, 1], and the model's ids of their classes."""
        for start in range(0, len(self), BATCH):
            rows = slice(start, start + BATCH)
            yield rows, as_floats(self.images[rows]), list(self.model_ids[rows])

    def compared(self, rebuilt: Pictures) -> Values:
        """What reconstructions of all images keep: means over images with the ends of their 95 % interval, and r-FD."""
        meter = ReconstructionMeter(self._network, self._perceptual, None)
        for rows, _, _ in self.batches():
            meter.update(self.images[rows], rebuilt[rows])
        scores, parts = meter.scores(Gaussian.of(self.headline)), rebuilt_parts(meter.features, self.headline)
        ends = [None, None]
        if (error := error_of(parts)) is not None:
            ends = [scores.frechet - NORMAL_95 * error, scores.frechet + NORMAL_95 * error]
        return {
            **{name: mean_and_interval(scores.values[name]) for name in (PSNR, LITE0)},
            f"r-FD-{self._network.headline}": [scores.frechet, *ends, parts],
            **self.class_accuracy(meter.features),
        }

    def class_accuracy(self, rows: np.ndarray) -> Values:
        """Share of images that the judge puts into their class, from their features; nothing without classes."""
        return {} if self._labels is None else {CLASS: mean_and_interval(self._judge.predict(rows) == self._labels)}
