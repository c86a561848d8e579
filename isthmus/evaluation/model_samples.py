"""Samples of a model: which classes they have, what decides about them, and drawing them where they are missing."""

import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from isthmus.errors import UserError
from isthmus.evaluation.balance import balance_words, class_balanced_labels, own_frequency_labels
from isthmus.evaluation.drawing import draw_chunks
from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.likelihood_scores import stage_lengths
from isthmus.evaluation.processes import Processes
from isthmus.evaluation.protocol import Subject
from isthmus.evaluation.real_side import DataSplits
from isthmus.evaluation.samples import ChunkStore
from isthmus.generation.options import FOLDER_DEFAULT, SamplingOptions
from isthmus.pipelines.labels import names_in_order, resolve_labels
from isthmus.pipelines.memory import batch_size_that_fits

if TYPE_CHECKING:
    from isthmus.pipelines.loading import AnyPipeline

logger = logging.getLogger("isthmus")

Balance = Literal["uniform", "data"]


@dataclass(frozen=True, eq=False)
class SampleClasses:
    """The class of every sample.

    Attributes:
        labels: class in the order of the data set; all 0 where either side has no classes.
        model_ids: the same as ids of the model; its null id where no class is asked for.
        names: by class of the data set; empty where either side has no classes.
        ids: of the model, by class of the data set; empty likewise.
        words: the balance, in words.
        rule: what decides the class of sample i, however many there are, in JSON values.
        model_names: names of the model's classes by its ids; empty where they have none.
    """

    labels: Int[np.ndarray, " n"]
    model_ids: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    ids: tuple[int, ...]
    words: str
    rule: dict[str, Any]
    model_names: tuple[str, ...]


def choose_classes(pipeline: "AnyPipeline", data: DataSplits, num: int, balance: Balance) -> SampleClasses:
    """The class of samples 0..num - 1, fixed by their numbers.

    Raises:
        UserError: the classes of the data are not those of the model, or frequencies are asked for and there are none.
    """
    names, nothing = data.class_names, np.zeros(num, np.int64)
    model_names = names_in_order(pipeline.class_names)
    if balance == "data" and not names:
        raise UserError(f"{data.spec} is unlabelled, so it has no class frequencies. Leave out --balance data.")
    if pipeline.num_classes == 0:
        if balance == "data":
            raise UserError(
                "the model is unlabelled, so it cannot draw classes as often as in the data. Leave out --balance data."
            )
        return SampleClasses(nothing, nothing, (), (), balance_words(None, ()), {"class_ids": []}, ())
    if not names:
        labels, ids = class_balanced_labels(num, pipeline.num_classes), list(range(pipeline.num_classes))
        words = balance_words(labels, model_names or list(map(str, ids)))
        return SampleClasses(nothing, labels, (), (), words, {"class_ids": ids}, model_names)
    if pipeline.class_names:
        ids = resolve_labels(names, class_names=pipeline.class_names, num_classes=pipeline.num_classes)
    elif len(names) == pipeline.num_classes:
        ids = list(range(len(names)))
    else:
        raise UserError(
            f"the model's {pipeline.num_classes} classes have no names, so the data must have as many, got "
            f"{len(names)}. Pass the data it was trained on."
        )
    counts, rule = data.class_counts(), {"class_ids": list(ids)}
    if balance == "uniform":
        labels = class_balanced_labels(num, len(names))
    else:
        labels = own_frequency_labels(num, counts)
        rule["class_counts"] = counts.tolist()
    words = balance_words(labels, names, counts)
    model_ids = np.array(ids, np.int64)[labels]
    # a model without names is given data with as many classes, in its own order
    return SampleClasses(labels, model_ids, names, tuple(ids), words, rule, model_names or names)


@dataclass(frozen=True, eq=False)
class ModelSamples:
    """Samples of one model with one set of options.

    Attributes:
        pipeline: draws them.
        classes: of every sample.
        store: where they lie.
        sampling: the options in full.
        request: arguments of the pipeline's call that say so.
        seed: image i is drawn from (seed, i).
    """

    pipeline: "AnyPipeline"
    classes: SampleClasses
    store: ChunkStore
    sampling: SamplingOptions
    request: dict[str, Any]
    seed: int

    def __len__(self) -> int:
        return len(self.classes.labels)

    def draw(
        self, network: FeatureNetwork, *, batch_size: int | None, processes: Processes, title: str = "samples"
    ) -> int:
        """Draw what is missing of this process's share; returns how many images that were."""
        size = batch_size or batch_size_that_fits(self.pipeline, guided=self.sampling.guidance_scale != 1)
        return draw_chunks(
            self.pipeline,
            self.store,
            self.classes.model_ids,
            seed=self.seed,
            request=self.request,
            network=network,
            batch_size=size,
            processes=processes,
            title=title,
        )


def model_samples(
    pipeline: "AnyPipeline",
    classes: SampleClasses,
    folder: Path,
    network: FeatureNetwork,
    *,
    seed: int,
    options: Mapping[str, Any],
    steering: Mapping[str, Any],
    dtype: str,
) -> ModelSamples:
    """The samples that a command asks for; nothing is drawn or written yet.

    Args:
        pipeline: draws them.
        classes: of every sample.
        folder: of the chunks.
        network: whose features are kept beside the images.
        seed: image i is drawn from (seed, i).
        options: sampling options by name; `FOLDER_DEFAULT` stands for the model's own.
        steering: arguments of a call beyond these, such as solver and steps, where the model has them.
        dtype: type of the weights.

    Raises:
        UserError: the model does not take an option, or the folder holds other samples.
    """
    sampling = pipeline.defaults.override(**options)
    pipeline.check_options(sampling)
    request = {name: value for name, value in options.items() if value is not FOLDER_DEFAULT} | dict(steering)
    known = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(name for name in request if name not in known)
    if unknown:
        raise UserError(f"this model, a {pipeline.kind}, has no {', '.join(unknown)}. Leave it out.")
    pipeline.stream(seed=seed, **request)  # checks its arguments at once and draws only when it is read
    settings = {
        "model": pipeline.fingerprint,
        "seed": seed,
        **classes.rule,
        "class_names": list(classes.model_names),
        "sampling": sampling.to_dict(),
        "steering": dict(steering),
        "dtype": dtype,
        "device": pipeline.device.type,
        "features": f"{network.name} {network.weights_sha256}",
        "stages": list(stage_lengths(pipeline).values()),
    }
    return ModelSamples(pipeline, classes, ChunkStore(folder, settings), sampling, request, seed)


def model_subject(name: str, samples: ModelSamples, steering: Mapping[str, Any], dtype: str) -> Subject:
    """The record's words for a model."""
    sampling = json.loads(json.dumps(samples.sampling.to_dict()))
    return Subject(
        name=name,
        kind=samples.pipeline.kind,
        fingerprint=samples.pipeline.fingerprint,
        seed=samples.seed,
        sampling=sampling,
        steering=dict(steering),
        dtype=dtype,
    )
