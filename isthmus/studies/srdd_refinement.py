"""Draws that are refined in two ways at equal numbers of forwards, and draws that are not."""

from collections.abc import Mapping, Sequence

import torch

from isthmus.pictures import to_uint8
from isthmus.pipelines.labels import Label
from isthmus.pipelines.memory import batch_size_that_fits
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.schedulers.scale_refinement import ScaleRefinementScheduler
from isthmus.studies.evaluations import EvaluationSetting
from isthmus.studies.experiments import Values
from isthmus.studies.real_images import DrawnSamples, RealImages


def equal_schedulers(num_scales: int) -> Mapping[str, ScaleRefinementScheduler]:
    """No refinement, and every mode at one cost: a round at each of the second to fourth scales, or a jump over these.

    >>> schedulers = equal_schedulers(6)
    >>> schedulers["masked"].rounds_of(6), schedulers["simple"].rounds_of(6), schedulers["simple"].jump_scales
    ((0, 1, 1, 1, 0, 0), (0, 0, 0, 1, 0, 0), 3)
    """
    last = min(3, num_scales - 1)
    rounds = tuple(int(1 <= scale <= last) for scale in range(num_scales))
    jump = tuple(int(scale == last) for scale in range(num_scales))
    return {
        "none": ScaleRefinementScheduler(),
        "simple": ScaleRefinementScheduler(mode="simple", rounds=jump, jump_scales=last),
        "masked": ScaleRefinementScheduler(mode="masked", rounds=rounds),
    }


def refined_values(
    pipeline: NextScalePipeline, setting: EvaluationSetting, *, seed: int, modes: Sequence[str]
) -> Values:
    """Scores of samples that were drawn in each of `modes`, and the forwards of a draw; image i is the same request."""
    real = RealImages.of(pipeline, setting)
    schedulers = equal_schedulers(pipeline.schedule.num_scales)
    labels: list[Label] = [None if one == pipeline.num_classes else int(one) for one in real.classes.model_ids]
    size = setting.batch_size or batch_size_that_fits(pipeline, guided=pipeline.defaults.guidance_scale != 1)
    by_mode, forwards = {}, {}
    for mode in modes:
        pipeline.scheduler = schedulers[mode]
        samples = DrawnSamples(real.network)
        for start in range(0, len(labels), size):
            drawn = pipeline(labels[start : start + size], seed=seed, image_index=start, output_type="pt")
            forwards[mode] = drawn.num_forwards
            samples.add(to_uint8(torch.as_tensor(drawn.images) * 2 - 1))
        by_mode[mode] = real.scored(samples)
    return real.values("by_mode", by_mode, pipeline.image_size) | {"forwards": forwards}
