"""What held-out images keep on their way through the tokens of a D-AR model, and what the tokens cost."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8

from isthmus.evaluation.circumstances import timing_words
from isthmus.evaluation.class_scores import NearestClassMean
from isthmus.evaluation.degradations import ruined
from isthmus.evaluation.feature_networks import FeatureNetwork, feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.held_out import HELD_OUT_LIMIT
from isthmus.evaluation.image_sets import some
from isthmus.evaluation.model_samples import choose_classes
from isthmus.evaluation.reconstruction import ReconstructionMeter, as_floats
from isthmus.evaluation.reconstruction_stages import reconstructions_by_stage
from isthmus.evaluation.statistics import Gaussian
from isthmus.functional.shapes import Images
from isthmus.models.perceptual import Lite0Distance
from isthmus.pictures import to_uint8
from isthmus.pipelines.dar import DARPipeline
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import choose_device
from isthmus.schedulers.flow_matching import Solver
from isthmus.studies.evaluations import EvaluationSetting, mean_and_interval
from isthmus.studies.experiments import Values
from isthmus.studies.real_images import splits_of

_BATCH = 32

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
    """

    images: Pictures
    labels: Int[np.ndarray, " n"] | None
    model_ids: Sequence[Label]
    network: FeatureNetwork
    judge: NearestClassMean | None
    headline: np.ndarray

    @classmethod
    def of(cls, pipeline: DARPipeline, setting: EvaluationSetting) -> "HeldOut":
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
        for start in range(0, len(self), _BATCH):
            yield start, as_floats(self.images[start : start + _BATCH])

    def compared(self, rebuilt: Pictures) -> Values:
        """What reconstructions of all images keep: means over images with the ends of their 95 % interval, and r-FD."""
        meter = ReconstructionMeter(self.network, Lite0Distance(), None)
        for start in range(0, len(self), _BATCH):
            meter.update(self.images[start : start + _BATCH], rebuilt[start : start + _BATCH])
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


def reconstruction_values(pipeline: DARPipeline, held_out: HeldOut) -> Values:
    """Reconstructions from the first tokens, by how many; then the images themselves and what a blur leaves."""
    parts: dict[str, list[Pictures]] = {}
    for start, images in held_out.batches():
        for name, rebuilt in reconstructions_by_stage(pipeline, images, first_index=start).items():
            parts.setdefault(name, []).append(rebuilt)
    values = {name: held_out.compared(np.concatenate(rebuilt)) for name, rebuilt in parts.items()}
    right = held_out.right(held_out.headline)
    floor = {} if right is None else {"class accuracy (nearest mean)": mean_and_interval(right)}
    return {
        "images": len(held_out),
        "by_tokens": values,
        "floor": floor,
        "ceiling": held_out.compared(np.stack(list(ruined(held_out.images)))),
    }


def solver_values(pipeline: DARPipeline, held_out: HeldOut, *, solvers: Sequence[str], steps: Sequence[int]) -> Values:
    """Reconstructions from all that a solver reads, by its rule and number of steps."""
    token_ids = torch.cat([pipeline.encode(images) for _, images in held_out.batches()])
    values = {}
    for solver in solvers:
        for number in steps:
            begin, parts = time.perf_counter(), []
            for start in range(0, len(held_out), _BATCH):
                found = pipeline.decode(
                    token_ids[start : start + _BATCH],
                    num_inference_steps=number,
                    solver=cast(Solver, solver),
                    seed=0,
                    image_index=start,
                    output_type="latent",
                )
                parts.append(to_uint8(torch.as_tensor(found)))
            seconds = time.perf_counter() - begin
            name = f"{solver}, {number} steps"
            values[name] = held_out.compared(np.concatenate(parts))
            values[name]["ms per image"] = [1000 * seconds / len(held_out)]
    return {
        "images": len(held_out),
        "by_solver": values,
        "trained_steps": _own_steps(pipeline),
        "timed_on": timing_words(pipeline.device),
    }


def order_values(pipeline: DARPipeline, held_out: HeldOut) -> Values:
    """Bits of every token of held-out images: means by position, and by group with the ends of their 95 % interval."""
    parts = [
        pipeline.bits_per_token(images, list(held_out.model_ids[start : start + _BATCH]))
        for start, images in held_out.batches()
    ]
    bits = torch.cat(parts).cpu().double().numpy()
    size = pipeline.image_tokenizer.tokens_per_group
    groups = [bits[:, start : start + size].mean(axis=1) for start in range(0, bits.shape[1], size)]
    return {
        "images": len(bits),
        "tokens_per_group": size,
        "by_position": bits.mean(axis=0).tolist(),
        "by_group": [mean_and_interval(group) for group in groups],
        "all": mean_and_interval(bits.mean(axis=1)),
    }


def _own_steps(pipeline: DARPipeline) -> str:
    config = pipeline.scheduler.config
    return f"{config['solver']}, {config['num_inference_steps']} steps"
