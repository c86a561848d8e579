"""Generative classification: accuracy against the cost of pruning:  python benchmarks/classification.py MODEL

Held-out images; beside it stand chance, and two probes of EfficientNet-Lite0 features fitted on the training split: the
nearest class mean, and logistic regression. Needs the demo extra (openmoji).
"""

import argparse
import time

import numpy as np
import torch
from measure import interleaved

from isthmus.data.opening import open_source
from isthmus.evaluation.classes import LinearProbe, NearestClassMean
from isthmus.evaluation.features import extract_features, feature_network
from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline

MARGINS = (None, 20.0, 12.0, 8.0, 5.0, 3.0, 2.0, 1.0)


def some(data: str, pipe, split: str, number: int) -> tuple[torch.Tensor, np.ndarray]:
    source = open_source(data, image_size=pipe.image_size, split=split, classes=names_in_order(pipe.class_names))
    chosen = np.random.default_rng(0).permutation(len(source))[:number]
    pixels = np.stack([source.load(int(index)) for index in chosen])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, source.labels[chosen]


def share(right: np.ndarray) -> str:
    mean = right.mean()
    return f"{100 * mean:.1f} +- {196 * np.sqrt(mean * (1 - mean) / len(right)):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", default="openmoji")
    parser.add_argument("--num", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--views", type=int, nargs="*", default=[1, 2, 4], help="numbers of perturbed views to average")
    parser.add_argument("--timed", type=int, default=64, help="images that are timed together")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe, start = load_pipeline(given.model, device="cpu"), time.perf_counter()
    images, labels = some(given.data, pipe, "val", given.num)
    print(f"{len(images)} held-out images, {pipe.num_classes} classes, {pipe.kind}")

    largest = np.bincount(labels).max() / len(labels)
    print(f"chance {100 / pipe.num_classes:.1f} %, always the commonest class {100 * largest:.1f} %")
    known, names = some(given.data, pipe, "train", 2000)
    network = feature_network("lite0")
    train, held = (extract_features(network, to_uint8(part)) for part in (known, images))
    near = NearestClassMean.fit(train["lite0-192"], names).predict(held["lite0-192"]) == labels
    linear = LinearProbe.fit(train["lite0-1280"], names)
    print(f"lite0, nearest class mean {share(near)} %")
    print(f"lite0, linear probe {share(linear.predict(held['lite0-1280']) == labels)} % (2,000 training images)")

    print(f"\n{'prune_nats':>10} {'top-1 %':>14} {'same as exact %':>16} {'tokens/image':>13} {'of exact':>9}")
    exact = None
    for margin in MARGINS:
        found = pipe.classify(images, prune_nats=margin)
        best, tokens = found.class_labels[:, 0].numpy(), found.scores.tokens.float().mean().item()
        exact = (best, tokens) if exact is None else exact
        same = 100 * (best == exact[0]).mean()
        print(f"{margin!s:>10} {share(best == labels):>14} {same:>16.1f} {tokens:>13.0f} {tokens / exact[1]:>9.3f}")
    for views in given.views:
        found = pipe.classify(images, prune_nats=None, num_views=views)
        print(f"mean over {views} view(s), noise 0.1: {share(found.class_labels[:, 0].numpy() == labels)} %")

    part = images[: given.timed]
    runs = {f"{margin}": (lambda margin=margin: pipe.classify(part, prune_nats=margin)) for margin in MARGINS}
    times = interleaved(runs | {"encode": lambda: pipe.encode(part)}, given.rounds)
    print(f"\nms for {len(part)} images, wall / CPU (medians of {given.rounds} interleaved rounds)")
    for name, seconds in times.items():
        print(f"{name:>10} {seconds.milliseconds():>22}  {times['None'].ratio(seconds)[1]:.2f} times as fast as exact")
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
