"""What the demos of both families share: their clock, their samples, and how a picture's class is judged."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from isthmus.data.source import ImageSource
from isthmus.demo.options import DemoOptions
from isthmus.evaluation.classes import NearestClassMean
from isthmus.evaluation.features import FeatureNetwork, extract_features, feature_network, source_images
from isthmus.evaluation.neighbours import memorised
from isthmus.evaluation.reference import training_views
from isthmus.pictures import to_uint8
from isthmus.pipelines.loading import AnyPipeline
from isthmus.training.config import Run
from isthmus.training.run import write_atomically

T = TypeVar("T")

IMAGE_SIZE_PX = 32
SAMPLES_PER_CLASS = 50
SHOWN_PER_CLASS = 10
# `--budget long` trains so many times longer
LONGER = 4


StageRun = TypeVar("StageRun", bound=Run)


def stage_run(preset: StageRun, options: DemoOptions, folder: str, *, longer: int, **changes: Any) -> StageRun:
    """A stage of the demo: the run of a preset on the demo's classes, `longer` times as long with `--budget long`."""
    return replace(
        preset,
        num_steps=preset.num_steps * (longer if options.budget == "long" else 1),
        classes=options.chosen_classes,
        seed=options.seed,
        mixed_precision=options.mixed_precision,
        out=options.folder / folder,
        **changes,
    )


def precisions(folder: Path) -> str:
    """Type of the products of both trainings, and why, from what their runs recorded."""
    records = {
        name: json.loads((folder / name / "run.json").read_text(encoding="utf-8")) for name in ("tokenizer", "model")
    }
    return ", ".join(f"{name} {record['precision']['why']}" for name, record in records.items())


class Clock:
    """Seconds per phase, kept in a file: a stage that was finished earlier keeps the time it took then."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def time(self, phase: str, work: Callable[[], T]) -> T:
        """Run `work` and note how long it took, unless an earlier run took longer (it did the work)."""
        start = time.perf_counter()
        result = work()
        self.seconds[phase] = round(max(time.perf_counter() - start, self.seconds.get(phase, 0.0)), 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.seconds))
        return result


def draw_samples(pipeline: AnyPipeline, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images in [-1, 1] and labels, the same number of each class; image i is image i of the seed."""
    labels = [label for label in range(pipeline.num_classes) for _ in range(SAMPLES_PER_CLASS)]
    parts = []
    for start in tqdm(range(0, len(labels), SAMPLES_PER_CLASS), desc="samples", unit="class", disable=None):
        chosen = labels[start : start + SAMPLES_PER_CLASS]
        output = pipeline(chosen, seed=seed, image_index=start, output_type="pt")
        parts.append(torch.as_tensor(output.images) * 2 - 1)
    return torch.cat(parts), np.array(labels)


def features_of(images: "ImageSource | torch.Tensor", network: FeatureNetwork) -> np.ndarray:
    """Features (n, 192) of a split, as it is evaluated, or of drawn images in [-1, 1]."""
    pictures = to_uint8(images) if isinstance(images, torch.Tensor) else source_images(images, IMAGE_SIZE_PX)
    return extract_features(network, pictures)[next(iter(network.spaces))]


@dataclass(frozen=True)
class ClassScores:
    """Whether drawn images look like their class and not like a training image; features of EfficientNet-Lite0.

    Attributes:
        class_accuracy: share of samples whose nearest class mean is their own class.
        class_accuracy_held_out: the same for held-out images, the ceiling.
        accuracy_by_class: class name -> share, of the samples.
        memorised: share of samples nearer to a training image than 99 % of held-out images are.
        memorised_views: the same of as many training images, shifted and mirrored as training sees them: what this
            search finds of true copies.
    """

    class_accuracy: float
    class_accuracy_held_out: float
    accuracy_by_class: dict[str, float]
    memorised: float
    memorised_views: float


class ClassJudge:
    """Class means of the training images, and what is measured against them.

    Args:
        train: images whose means are taken.
        held_out: images of the same classes that nothing was trained on.
    """

    def __init__(self, train: ImageSource, held_out: ImageSource):
        self.train, self.names = train, list(train.class_names)
        self.network = feature_network("lite0")
        self.real, self.unseen = (features_of(images, self.network) for images in (train, held_out))
        self.means = NearestClassMean.fit(self.real, train.labels)
        self.ceiling = self.means.accuracy(self.unseen, held_out.labels)

    def accuracy(self, images: torch.Tensor, labels: np.ndarray) -> float:
        """Share of images in [-1, 1] whose nearest class mean is their own class."""
        return self.means.accuracy(features_of(images, self.network), labels)

    def _views(self, count: int) -> np.ndarray:
        """Features of training images as training sees them."""
        views = training_views(self.train, IMAGE_SIZE_PX, count)
        return extract_features(self.network, views)[next(iter(self.network.spaces))]

    def scores(self, images: torch.Tensor, labels: np.ndarray) -> ClassScores:
        """Everything that is said of drawn images in [-1, 1]."""
        drawn = features_of(images, self.network)
        found = self.means.predict(drawn)
        return ClassScores(
            class_accuracy=float((found == labels).mean()),
            class_accuracy_held_out=self.ceiling,
            accuracy_by_class={name: float((found[labels == i] == i).mean()) for i, name in enumerate(self.names)},
            memorised=float(memorised(drawn, self.real, self.unseen).mean()),
            memorised_views=float(memorised(self._views(len(drawn)), self.real, self.unseen).mean()),
        )
