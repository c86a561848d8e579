"""The real images that a study measures against: opened and measured once for all settings of a table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from jaxtyping import UInt8

from isthmus.evaluation.feature_networks import FeatureNetwork, feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.generation_scores import Features
from isthmus.evaluation.guards import check_duplicates, pixel_digest
from isthmus.evaluation.model_samples import SampleClasses, choose_classes
from isthmus.evaluation.real_side import (
    DataSplits,
    RealSide,
    Reference,
    choose_reference,
    open_splits,
)
from isthmus.evaluation.reference_facts import protocol_of
from isthmus.evaluation.scoring import SampleScores, score_samples
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import AnyPipeline, choose_device
from isthmus.studies.evaluations import EvaluationSetting
from isthmus.studies.experiments import Values


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
class RealImages:
    """Everything that samples of one model are scored against, by the protocol of `isthmus evaluate`.

    Attributes:
        network: whose features are compared.
        splits: training and held-out images.
        classes: of the samples, fixed by their numbers.
        reference: what distances are taken to.
        measured: the same, measured.
    """

    network: FeatureNetwork
    splits: DataSplits
    classes: SampleClasses
    reference: Reference
    measured: RealSide

    @classmethod
    def of(cls, pipeline: AnyPipeline, setting: EvaluationSetting) -> "RealImages":
        """Open and measure them.

        Raises:
            UserError: the data do not fit the model, or there are too few images.
        """
        network = feature_network("lite0", device=choose_device(setting.device))
        splits = splits_of(pipeline, setting)
        reference = choose_reference(splits, None, size=(pipeline.image_size, pipeline.image_size))
        n = reference.images_per_measurement(setting.num)
        return cls(
            network,
            splits,
            choose_classes(pipeline, splits, setting.num, setting.balance),
            reference,
            setting.real_sides.measure(reference, splits, network, n),
        )

    def scored(self, drawn: "DrawnSamples") -> SampleScores:
        """Scores of samples, and what the guards say of them."""
        labels, names = (self.classes.labels if self.classes.names else None), self.classes.names
        found = score_samples(drawn.features(), labels, self.reference, self.measured, self.network, names)
        warning = check_duplicates(drawn.digests)
        return found if warning is None else replace(found, warnings=(*found.warnings, warning))

    def values(self, by: str, found: Mapping[str, SampleScores], image_size: int) -> Values:
        """What tables read of several sets of samples: protocol, warnings, and under `by` the scores of every set."""
        num, size = len(self.classes.labels), (image_size, image_size)
        protocol = protocol_of(self.network, self.reference, self.splits, num, size, self.classes.words)
        said = dict.fromkeys(warning for scored in found.values() for warning in scored.warnings)
        scores = {name: {score.name: asdict(score) for score in scored.scores} for name, scored in found.items()}
        return {"protocol": asdict(protocol), "warnings": list(said), by: scores}


@dataclass(frozen=True, eq=False)
class DrawnSamples:
    """Samples of which features and digests are kept, not the images.

    Attributes:
        network: whose features.
        parts: of every batch that was added.
        digests: of every image.
    """

    network: FeatureNetwork
    parts: list[Features] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def add(self, images: UInt8[np.ndarray, "_ _ _ 3"]) -> None:
        """Read a batch, 0..255."""
        self.parts.append(extract_features(self.network, images))
        self.digests.extend(pixel_digest(image) for image in images)

    def features(self) -> Features:
        """Of all images by space, in the order in which they came."""
        return {space: np.concatenate([part[space] for part in self.parts]) for space in self.parts[0]}
