"""Speed and memory of the measures, as ratios of one run.

    python benchmarks/evaluation.py [--quick] [--threads N] [--only features,statistics,scoring,neighbours]

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

from isthmus.evaluation.features import FeatureNetwork, extract_features, feature_network
from isthmus.evaluation.neighbours import manifold_scores
from isthmus.evaluation.reference import LabelledFeatures, RealFeatures, RealSide, Reference
from isthmus.evaluation.scores import score_samples
from isthmus.evaluation.statistics import Gaussian, frechet_distance, mean_and_covariance
from isthmus.nn.perceptual import EfficientNetLite0

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


def scoring(rounds: int, quick: bool) -> None:
    """Peak memory of scoring samples against as many real images, beyond imports and beyond the features themselves."""
    del rounds  # memory is the same every time
    count = NUM_IMAGES // 10 if quick else NUM_IMAGES
    own, peak, seconds = in_child("evaluation.py", "--threads", str(torch.get_num_threads()), "--score", str(count))
    table(
        "Scoring: distances, class scores and copies",
        ("samples", "width", "MiB of their features", "MiB beyond all features", "share", "CPU seconds"),
        [[f"{count:,}", f"{WIDTH:,}", f"{own:,.0f}", f"{peak:,.0f}", f"{peak / own:.2f}", f"{seconds:,.0f}"]],
    )


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
    chunks = (generator.standard_normal((CHUNK, WIDTH), dtype=np.float32) for _ in range(count // CHUNK))
    assert mean_and_covariance(chunks)[1].shape == (WIDTH, WIDTH)
    return peak_mib() - before, time.process_time() - start


def score_child(count: int) -> tuple[float, float, float]:
    """MiB of `count` samples' features, MiB that scoring them adds beyond all features, and CPU seconds.

    n = 2,500 real images, 10,000 for training: what does not grow with the samples is kept small beside them.
    """
    import time

    generator, space = np.random.default_rng(0), "wide"

    def rows(number: int) -> np.ndarray:
        return generator.standard_normal((number, WIDTH), dtype=np.float32)

    network = FeatureNetwork(
        lambda images: {}, name="net", spaces={space: WIDTH}, preprocessing="", weights_sha256="",
        device=torch.device("cpu"),
    )  # fmt: skip
    sides = RealFeatures(*({space: rows(2_500)} for _ in range(3)))
    training, held_out = (LabelledFeatures(rows(number), np.arange(number) % 10) for number in (10_000, 1_000))
    real = RealSide(sides, training, held_out, (), (rows(1_000), rows(1_000)))
    samples, labels = {space: rows(count)}, np.arange(count) % 10
    before, start = peak_mib(), time.process_time()
    score_samples(samples, labels, Reference("noise", "0", None), real, network, list("abcdefghij"))
    return samples[space].nbytes / 2**20, peak_mib() - before, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and a tenth of the images")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--only", default="features,statistics,scoring,neighbours", help="sections to run")
    parser.add_argument("--stream", type=int, help="stream so many rows in this process and stop")
    parser.add_argument("--score", type=int, help="score so many samples in this process and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.stream:
        print(*stream_child(arguments.stream))
        return
    if arguments.score:
        print(*score_child(arguments.score))
        return
    print(machine())
    rounds = 2 if arguments.quick else 5
    sections = {"features": features, "statistics": statistics, "scoring": scoring, "neighbours": neighbours}
    for name in arguments.only.split(","):
        sections[name](rounds, arguments.quick)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
