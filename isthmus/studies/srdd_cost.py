"""Time and memory of next-scale priors against each other: a training step, and drawing images."""

from collections.abc import Callable, Mapping

import torch

from isthmus.data.batches import CachedTokens, training_batches
from isthmus.data.token_cache import TokenCache
from isthmus.evaluation.circumstances import timing_words
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.studies.experiments import Values
from isthmus.studies.step_cost import interleaved_seconds, peak_bytes
from isthmus.training.config import PriorRun
from isthmus.training.next_scale_prior import NextScalePrior
from isthmus.training.optim import adamw

DRAWN_IMAGES = 16


def cost_values(runs: Mapping[str, PriorRun], device: torch.device, *, rounds: int) -> Values:
    """Seconds per training step and per image by round, and peak bytes of both, of trained runs.

    Models are timed in turn within a round, so that whatever else the machine does hits all of them.
    """
    steps = {name: training_step(run, device) for name, run in runs.items()}
    step_seconds = interleaved_seconds(steps, device, rounds=rounds)
    step_bytes = {name: peak_bytes(step, device) for name, step in steps.items()}
    del steps
    draws = {name: drawing(run, device) for name, run in runs.items()}
    draw_seconds = interleaved_seconds(draws, device, rounds=rounds)
    # without the pixel decoder, which is the same for all and would hide what the priors hold
    draw_bytes = {name: peak_bytes(drawing(run, device, pixels=False), device) for name, run in runs.items()}
    return {
        name: {
            "batch_size": run.batch_size,
            "step_seconds": step_seconds[name],
            "step_bytes": step_bytes[name],
            "drawn_at_once": DRAWN_IMAGES,
            "image_seconds": [seconds / DRAWN_IMAGES for seconds in draw_seconds[name]],
            "image_bytes": draw_bytes[name] / DRAWN_IMAGES,
            "timed_on": timing_words(device),
        }
        for name, run in runs.items()
    }


def training_step(run: PriorRun, device: torch.device) -> Callable[[], None]:
    """One optimizer step of a run, as its training does it, on a network that starts anew and one batch.

    Precision is float32, whatever the training uses on a GPU.
    """
    family = NextScalePrior(run)
    family.tokenizer.to(device)
    network = family.network.to(device).train()  # pyright: ignore[reportArgumentType]
    assert run.token_cache is not None, "the study shares its caches"
    cache = TokenCache.open(run.token_cache, family.tokenizer)
    tokens = CachedTokens(cache, seed=run.seed, balanced=family.train.balanced)
    batch = next(training_batches(tokens, batch_size=run.batch_size, num_workers=0))
    optimizer = adamw(network, run.optim)

    def step() -> None:
        family.losses(network, batch, 0).total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), run.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def drawing(run: PriorRun, device: torch.device, *, pixels: bool = True) -> Callable[[], None]:
    """Drawing `DRAWN_IMAGES` images at once at the guidance of the run; without `pixels`, their tokens and features."""
    pipeline = load_pipeline(str(run.out), device=device)
    assert isinstance(pipeline, NextScalePipeline), "the prior's run writes one"
    labels = [i % max(pipeline.num_classes, 1) if pipeline.num_classes else None for i in range(DRAWN_IMAGES)]

    def draw() -> None:
        pipeline(labels, seed=0, output_type="pt" if pixels else "latent")

    draw()  # warms up
    return draw
