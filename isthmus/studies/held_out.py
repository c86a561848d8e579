"""Held-out images that a study rebuilds or edits, and how near to them the results are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int, UInt8

from isthmus.evaluation.class_scores import NearestClassMean
from isthmus.evaluation.feature_networks import FeatureNetwork, feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.held_out import HELD_OUT_LIMIT
from isthmus.evaluation.image_sets import some
from isthmus.evaluation.model_samples import choose_classes
from isthmus.evaluation.reconstruction import ReconstructionMeter, as_floats
from isthmus.evaluation.statistics import Gaussian
from isthmus.functional.shapes import Images
from isthmus.models.perceptual import Lite0Distance
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import AnyPipeline, choose_device
from isthmus.studies.evaluations import EvaluationSetting, mean_and_interval
from isthmus.studies.experiments import Values
from isthmus.studies.real_images import splits_of

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
            "PSNR, dB": mean_and_interval(scores.psnr),
            "lite0 distance": mean_and_interval(scores.perceptual),
            f"r-FD-{space}": [scores.frechet],
        }
        right = self.right(extract_features(self.network, rebuilt)[space])
        return values if right is None else values | {"class accuracy (nearest mean)": mean_and_interval(right)}

    def right(self, rows: np.ndarray) -> Bool[np.ndarray, " n"] | None:
        """Which images the judge puts into their class; None where there are no classes."""
        return None if self.judge is None or self.labels is None else self.judge.predict(rows) == self.labels
