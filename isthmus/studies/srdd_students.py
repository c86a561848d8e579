"""Students on a shorter schedule: with and without the teacher, at equal everything else."""

from pathlib import Path

from isthmus.distillation_figures import measured_times
from isthmus.evaluation.circumstances import timing_words
from isthmus.pipelines.loading import choose_device, load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.studies.experiments import Values


def load_next_scale(folder: Path, device: str) -> NextScalePipeline:
    """A model of the study."""
    pipeline = load_pipeline(str(folder), device=choose_device(device))
    assert isinstance(pipeline, NextScalePipeline), "the study trains no other models"
    return pipeline


def drawing_values(models: dict[str, NextScalePipeline], *, seed: int) -> Values:
    """Milliseconds of wall time per image, in rounds that take turns, with what a draw consists of."""
    times = measured_times(models, seed=seed)
    device = next(iter(models.values())).device
    return {"timed_on": timing_words(device)} | {
        name: {
            "ms": times[name][0],
            "scales": "-".join(map(str, model.schedule.sizes)),
            "tokens": model.schedule.num_tokens,
        }
        for name, model in models.items()
    }
