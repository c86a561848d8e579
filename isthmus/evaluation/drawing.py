"""The samples of a model for an evaluation: which classes they have, what decides about them, and drawing what is
missing.
"""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from tqdm import tqdm

from isthmus.errors import UserError
from isthmus.evaluation.classes import balance_words, class_balanced_labels, own_frequency_labels
from isthmus.evaluation.features import FeatureNetwork, extract_features
from isthmus.evaluation.held_out import stage_lengths
from isthmus.evaluation.record import Subject
from isthmus.evaluation.reference import DataSplits
from isthmus.evaluation.samples import CHUNK, ChunkStore, SampleChunk, chunk_size
from isthmus.pipelines.labels import Label, names_in_order, resolve_labels
from isthmus.pipelines.memory import batch_size_that_fits, naming_next_batch_size
from isthmus.pipelines.options import FOLDER_DEFAULT, SamplingOptions
from isthmus.processes import Processes

if TYPE_CHECKING:
    from isthmus.pipelines.loading import AnyPipeline

logger = logging.getLogger("isthmus")

# images per forward of the feature network, whatever the batch of the draw: sums are rounded alike
FEATURE_BATCH = 50


def draw_chunks(
    pipeline: "AnyPipeline",
    store: ChunkStore,
    labels: Int[np.ndarray, " n"],
    *,
    seed: int,
    request: Mapping[str, Any],
    network: FeatureNetwork,
    batch_size: int,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
    title: str = "samples",
) -> int:
    """Draw what is missing of this process's share; returns how many images that were.

    Args:
        pipeline: draws.
        store: where chunks go; a chunk that is there is not drawn again.
        labels: class id of every image of the evaluation.
        seed: image i is drawn from (seed, i).
        request: arguments of the pipeline's call beside labels, seed and number.
        network: features of the finished images.
        batch_size: images drawn at once; it changes no image.
        processes: chunk c belongs to process c modulo their number.
        title: of the progress bar.

    Raises:
        UserError: memory ran out (names the next batch size to try).
    """
    mine = [chunk for chunk in store.missing(len(labels)) if chunk % processes.count == processes.rank]
    todo = sum(chunk_size(chunk, len(labels)) for chunk in mine)
    quiet = True if logger.getEffectiveLevel() > logging.INFO or not todo else None
    with tqdm(total=todo, desc=title, unit="image", disable=quiet) as bar:
        for chunk in mine:
            indices = range(chunk * CHUNK, chunk * CHUNK + chunk_size(chunk, len(labels)))
            images, token_ids = [], []
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                drawn = _draw(pipeline, batch, labels, seed, request)
                images.append(drawn[0])
                token_ids.append(drawn[1])
                bar.update(len(batch))
            pictures = np.concatenate(images)
            rows = extract_features(network, pictures, batch_size=FEATURE_BATCH)
            store.write(chunk, SampleChunk(pictures, labels[list(indices)], np.concatenate(token_ids), rows))
    return todo


def _draw(
    pipeline: "AnyPipeline",
    indices: Sequence[int],
    labels: Int[np.ndarray, " n"],
    seed: int,
    request: Mapping[str, Any],
) -> tuple[UInt8[np.ndarray, "b h w 3"], Int[np.ndarray, "b l"]]:
    """Images and token ids; the pictures are those `isthmus sample` writes."""
    ids: list[Label] = [None if labels[i] == pipeline.num_classes else int(labels[i]) for i in indices]
    with naming_next_batch_size(len(ids)):
        result = pipeline(ids, seed=seed, image_index=list(indices), **request)
    drawn = result.token_ids
    token_ids = drawn if isinstance(drawn, Tensor) else torch.cat(list(drawn), dim=1)
    assert isinstance(result.images, list), "pictures are asked for"
    return np.stack([np.asarray(picture) for picture in result.images]), token_ids.numpy()


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
