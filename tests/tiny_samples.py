"""A drawing of samples that a test may kill: started as a process, it says when its first images are there."""

import sys
from pathlib import Path

from isthmus import samples
from isthmus.evaluation.classes import class_balanced_labels
from isthmus.samples import SampleRequest
from tests.pipelines.tiny import tiny_pipeline

REPOSITORY = Path(__file__).resolve().parents[1]
NUM, SEED = 10, 5


def tiny_request(pipeline, num: int = NUM, *, seed: int = SEED, **given) -> SampleRequest:
    """The classes of a pipeline in turn."""
    labels = class_balanced_labels(num, pipeline.num_classes).tolist()
    return SampleRequest.of(
        pipeline, labels, classes={"class_ids": list(range(pipeline.num_classes))}, seed=seed, **given
    )


def main(folder: Path) -> None:
    pipeline = tiny_pipeline()
    save, saved = samples.save_picture, []

    def watched(*arguments) -> None:
        """Says that three images are there, then goes on without haste until it is killed."""
        save(*arguments)
        saved.append(arguments)
        if len(saved) == 3:
            print("three images", flush=True)
            sys.stdin.read()

    samples.save_picture = watched
    samples.draw(pipeline, folder, tiny_request(pipeline), batch_size=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
