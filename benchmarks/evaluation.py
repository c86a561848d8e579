"""Speed and memory of the measures, as ratios of one run.

    python benchmarks/evaluation.py [--quick] [--threads N] [--only features,statistics,neighbours]

Every section prints a Markdown table; cells with two figures are wall time / CPU time of the process. How to read
them: docs/benchmarks.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np
import torch
from measure import both, in_child, interleaved, machine, peak_mib

from isthmus.evaluation.feature_networks import feature_network
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.neighbours import manifold_scores
from isthmus.evaluation.statistics import Gaussian, GaussianStatistics, frechet_distance
from isthmus.models.efficientnet_lite import EfficientNetLite0

# aimed for: the covariance of 50,000 images on 2,048-wide features in under 1 GB
NUM_IMAGES, WIDTH, CHUNK = 50_000, 2048, 250


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def features(rounds: int, quick: bool) -> None:
    """From 8-bit images in memory to arrays of features, against the network's forward pass on ready batches."""
    network, bare, rows = feature_network("lite0"), EfficientNetLite0(), []
    for side, batch in ((32, 64), (64, 64), (256, 8)):
        images = np.random.default_rng(0).integers(0, 256, (batch * (1 if quick else 2), side, side, 3), dtype=np.uint8)
        ready = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).split(batch)

        @torch.inference_mode()
        def forward(batches: Sequence[torch.Tensor] = ready) -> None:
            for one in batches:
                bare.features(one)

        times = interleaved(
            {
                "forward": forward,
                "features": lambda images=images, batch=batch: extract_features(network, images, batch_size=batch),
            },
            rounds,
        )
        share = times["forward"].ratio(times["features"])
        rows.append([f"{side} px, batch {batch}", times["features"].milliseconds(), both(share, ".0%")])
    table("Feature extraction", ("images", "ms", "of the network's own rate"), rows)


def statistics(rounds: int, quick: bool) -> None:
    """Peak memory of the streamed covariance in a fresh process, and what a Frechet distance costs."""
    count = NUM_IMAGES // 10 if quick else NUM_IMAGES
    peak, seconds = in_child("evaluation.py", "--threads", str(torch.get_num_threads()), "--stream", str(count))
    table(
        "Streamed mean and covariance",
        ("images", "width", "MiB beyond imports", "CPU seconds"),
        [[f"{count:,}", f"{WIDTH:,}", f"{peak:,.0f}", f"{seconds:,.1f}"]],
    )
    rows, generator = [], np.random.default_rng(0)
    for count, width in ((500, 192), (500, 1280), (1500, 1280)):
        a, b = (generator.normal(size=(count, width)).astype(np.float32) for _ in range(2))
        reference = Gaussian.of(b)
        times = interleaved(
            {
                "fit": lambda a=a: Gaussian.of(a),
                "both": lambda a=a, reference=reference: frechet_distance(Gaussian.of(a), reference),
            },
            1 if quick else rounds,
        )
        rows.append([f"{count:,} x {width:,}", times["fit"].milliseconds(), times["both"].milliseconds()])
    table("Frechet distance to a reference that is fitted", ("samples", "fit, ms", "fit and distance, ms"), rows)


def neighbours(rounds: int, quick: bool) -> None:
    """Precision, recall, density and coverage, against the matrix products alone."""
    count = 1000 if quick else 4000
    a, b = (np.random.default_rng(i).normal(size=(count, 192)) for i in range(2))
    # within the real images, within the samples, and between: three products of all pairs
    times = interleaved(
        {"products": lambda: [x @ y.T for x, y in ((a, a), (b, b), (a, b))], "scores": lambda: manifold_scores(a, b)},
        rounds,
    )
    row = [f"{count:,} against {count:,}, 192 wide", times["scores"].milliseconds()]
    row.append("x" + both(times["scores"].ratio(times["products"]), ".1f"))
    table("Precision, recall, density and coverage", ("images", "ms", "against three float64 products"), [row])


def stream_child(count: int) -> tuple[float, float]:
    """MiB that streaming `count` rows adds to this process, and its CPU seconds."""
    import time

    before, start, generator = peak_mib(), time.process_time(), np.random.default_rng(0)
    statistics = GaussianStatistics(WIDTH)
    for _ in range(count // CHUNK):
        statistics.update(generator.standard_normal((CHUNK, WIDTH), dtype=np.float32))
    assert statistics.covariance.shape == (WIDTH, WIDTH)
    return peak_mib() - before, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and a tenth of the images")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--only", default="features,statistics,neighbours", help="sections to run")
    parser.add_argument("--stream", type=int, help="stream so many rows in this process and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.stream:
        print(*stream_child(arguments.stream))
        return
    print(machine())
    rounds = 2 if arguments.quick else 5
    sections = {"features": features, "statistics": statistics, "neighbours": neighbours}
    for name in arguments.only.split(","):
        sections[name](rounds, arguments.quick)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
