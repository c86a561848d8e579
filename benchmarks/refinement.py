"""Does refinement help? FD and class consistency of draws without, and with, rounds that cost the same forwards.

    python benchmarks/refinement.py MODEL_WITH_CRITIC [--trained MODEL] --data openmoji --classes face,flag --num 512

`--trained` is a model trained with `isthmus train prior --refinement-probability`. FD is the Frechet distance between
EfficientNet-Lite0 features (192 averaged channels) of draws and of training images; class consistency is the share of
draws whose nearest class mean (1,280 pooled features) is that of their label. Both are means over seeds, with the
half-width of a 95 % t interval. Numbers compare only within one table.
"""

import argparse
import math
import statistics
import time

import numpy as np
import torch

from isthmus.data.opening import open_source
from isthmus.evaluation.class_scores import NearestClassMean
from isthmus.evaluation.feature_networks import feature_network
from isthmus.evaluation.features import extract_features, source_images
from isthmus.evaluation.statistics import Gaussian, frechet_distance
from isthmus.pictures import to_uint8
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.schedulers.scale_refinement import ScaleRefinementScheduler

# 97.5 % points of Student's t, by degrees of freedom
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}


def schedulers(num_scales: int) -> dict[str, ScaleRefinementScheduler]:
    """Three forwards more than a plain draw, each: rounds at the second to fourth scale, or one jump over three."""
    rounds = tuple(int(1 <= scale <= 3) for scale in range(num_scales))
    jump = tuple(int(scale == 3) for scale in range(num_scales))
    return {
        "none": ScaleRefinementScheduler(),
        "simple": ScaleRefinementScheduler(mode="simple", rounds=jump, jump_scales=3),
        "masked": ScaleRefinementScheduler(mode="masked", rounds=rounds),
        "critic": ScaleRefinementScheduler(mode="critic", rounds=rounds),
    }


def drawn(pipe: NextScalePipeline, num: int, seed: int, batch: int) -> tuple[torch.Tensor, np.ndarray, int, float]:
    """Images in [-1, 1], labels, forwards of one call, seconds."""
    images, labels, forwards, start = [], [], 0, time.perf_counter()
    for first in range(0, num, batch):
        ids = [i % pipe.num_classes for i in range(first, min(first + batch, num))]
        result = pipe(ids, seed=seed, image_index=first, output_type="pt")
        images.append(torch.as_tensor(result.images) * 2 - 1)
        labels += ids
        forwards = result.num_forwards
    return torch.cat(images), np.array(labels), forwards, time.perf_counter() - start


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    half = _T.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--trained", default="")
    parser.add_argument("--data", default="openmoji")
    parser.add_argument("--classes", default="")
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    asked = parser.parse_args()

    models = {"": load_pipeline(asked.model)}
    if asked.trained:
        models[" (trained for it)"] = load_pipeline(asked.trained)
    first = models[""]
    assert isinstance(first, NextScalePipeline)
    names = tuple(asked.classes.split(",")) if asked.classes else None
    source = open_source(asked.data, image_size=first.image_size, split="train", classes=names)
    network = feature_network("lite0")
    real = extract_features(network, source_images(source, first.image_size))
    reference = Gaussian.of(real["lite0-192"])
    means = NearestClassMean.fit(real["lite0-1280"], source.labels)

    print(f"{asked.num} draws, {asked.seeds} seeds, {len(source)} training images\n")
    print("| draws | forwards | FD (lite0) | class consistency | seconds |\n|---|---|---|---|---|")
    for suffix, pipe in models.items():
        assert isinstance(pipe, NextScalePipeline)
        for name, scheduler in schedulers(pipe.schedule.num_scales).items():
            if name == "critic" and pipe.critic is None:
                continue
            pipe.scheduler = scheduler
            distances, consistencies, seconds, forwards = [], [], [], 0
            for seed in range(asked.seeds):
                images, labels, forwards, took = drawn(pipe, asked.num, seed, asked.batch)
                features = extract_features(network, to_uint8(images))
                distances.append(frechet_distance(Gaussian.of(features["lite0-192"]), reference))
                consistencies.append(means.accuracy(features["lite0-1280"], labels))
                seconds.append(took)
            cells = (name + suffix, forwards, interval(distances), interval(consistencies), f"{min(seconds):.1f}")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
