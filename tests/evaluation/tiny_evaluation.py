"""A drawing of samples that a test may kill: started as a process, it says when its first chunk is there."""

import os
import sys
from pathlib import Path

import torch

from isthmus.evaluation import drawing, samples
from isthmus.evaluation.classes import class_balanced_labels
from isthmus.evaluation.features import FeatureNetwork
from isthmus.evaluation.samples import ChunkStore
from tests.pipelines.tiny import tiny_pipeline

REPOSITORY = Path(__file__).resolve().parents[2]
NUM, SEED = 10, 5


def mean_colour() -> FeatureNetwork:
    """A feature network of three numbers."""
    return FeatureNetwork(
        lambda images: {"colour": images.float().mean(dim=(2, 3))},
        name="colour",
        spaces={"colour": 3},
        preprocessing="none",
        weights_sha256="",
        device=torch.device("cpu"),
    )


def tiny_model():
    return tiny_pipeline()


def store(folder: Path) -> ChunkStore:
    return ChunkStore(folder, {"seed": SEED})


class Watched(ChunkStore):
    """Says that the first chunk is there, then goes on without haste until it is killed."""

    def write(self, chunk, samples) -> None:
        super().write(chunk, samples)
        print("first chunk", flush=True)
        sys.stdin.read()


def main(folder: Path) -> None:
    samples.CHUNK = drawing.CHUNK = int(os.environ["ISTHMUS_TEST_CHUNK"])
    pipeline = tiny_model()
    labels = class_balanced_labels(NUM, pipeline.num_classes)
    chunks = Watched(folder, {"seed": SEED})
    drawing.draw_chunks(pipeline, chunks, labels, seed=SEED, request={}, network=mean_colour(), batch_size=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
