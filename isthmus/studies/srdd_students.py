"""Students on a shorter schedule: with and without the teacher, at equal everything else."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from isthmus.evaluation.circumstances import timing_words
from isthmus.pipelines.loading import choose_device, load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.studies.experiments import Values

_TIMED_IMAGES, _ROUNDS = 8, 7


def load_next_scale(folder: Path, device: str) -> NextScalePipeline:
    """A model of the study."""
    pipeline = load_pipeline(str(folder), device=choose_device(device))
    assert isinstance(pipeline, NextScalePipeline), "the study trains no other models"
    return pipeline


def drawing_values(models: Mapping[str, NextScalePipeline], *, seed: int) -> Values:
    """Milliseconds of wall time per image, with what a draw consists of: medians over rounds that take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(_ROUNDS + 1):
        for name, model in models.items():
            labels = [i % model.num_classes if model.num_classes else None for i in range(_TIMED_IMAGES)]
            start = time.perf_counter()
            model(labels, seed=seed, output_type="pil")  # pictures: the device is waited for
            if turn:  # the first warms up
                rounds[name].append(time.perf_counter() - start)
    device = next(iter(models.values())).device
    return {"timed_on": timing_words(device)} | {
        name: {
            "ms": 1e3 / _TIMED_IMAGES * statistics.median(rounds[name]),
            "scales": "-".join(map(str, model.schedule.sizes)),
            "tokens": model.schedule.num_tokens,
        }
        for name, model in models.items()
    }
