"""The real images that a study measures against: opened and measured once for all settings of a table."""

from dataclasses import asdict, dataclass
from typing import Any

from isthmus.evaluation.feature_networks import FeatureNetwork, feature_network
from isthmus.evaluation.generation_scores import Features
from isthmus.evaluation.model_samples import SampleClasses, choose_classes
from isthmus.evaluation.real_side import (
    DataSplits,
    RealSide,
    Reference,
    choose_reference,
    open_splits,
)
from isthmus.evaluation.reference_facts import protocol_of
from isthmus.evaluation.scoring import score_samples
from isthmus.pipelines.loading import AnyPipeline, choose_device
from isthmus.studies.evaluations import EvaluationSetting
from isthmus.studies.experiments import Values


def splits_of(pipeline: AnyPipeline, setting: EvaluationSetting) -> DataSplits:
    """Training and held-out images, as `isthmus evaluate` opens them for this model."""
    names = tuple(pipeline.class_names[str(i)] for i in range(len(pipeline.class_names)))
    return open_splits(setting.data, image_size=pipeline.image_size, classes=setting.classes or (), wanted=names)


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
            choose_classes(pipeline, splits, setting.num, "uniform"),
            reference,
            setting.real_sides.measure(reference, splits, network, n),
        )

    def scores(self, features: Features) -> Values:
        """Scores of samples by name, in JSON values."""
        labels, names = (self.classes.labels if self.classes.names else None), self.classes.names
        found = score_samples(features, labels, self.reference, self.measured, self.network, names)
        return {score.name: asdict(score) for score in found.scores}

    def protocol(self, image_size: int) -> dict[str, Any]:
        """How samples are measured, in JSON values."""
        num, size = len(self.classes.labels), (image_size, image_size)
        return asdict(protocol_of(self.network, self.reference, self.splits, num, size, self.classes.words))
