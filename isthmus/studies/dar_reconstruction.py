"""What held-out images keep on their way through the tokens of a D-AR model, and what the tokens cost."""

import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from isthmus.evaluation.circumstances import timing_words
from isthmus.evaluation.degradations import ruined
from isthmus.evaluation.reconstruction_stages import reconstructions_by_stage
from isthmus.pictures import to_uint8
from isthmus.pipelines.dar import DARPipeline
from isthmus.schedulers.flow_matching import Solver
from isthmus.studies.evaluations import mean_and_interval
from isthmus.studies.experiments import Values
from isthmus.studies.held_out import BATCH, HeldOut, Pictures


def reconstruction_values(pipeline: DARPipeline, held_out: HeldOut) -> Values:
    """Reconstructions from the first tokens, by how many; then the images themselves and what a blur leaves."""
    parts: dict[str, list[Pictures]] = {}
    for start, images in held_out.batches():
        for name, rebuilt in reconstructions_by_stage(pipeline, images, first_index=start).items():
            parts.setdefault(name, []).append(rebuilt)
    values = {name: held_out.compared(np.concatenate(rebuilt)) for name, rebuilt in parts.items()}
    right = held_out.right(held_out.headline)
    floor = {} if right is None else {"class accuracy (nearest mean)": mean_and_interval(right)}
    return {
        "images": len(held_out),
        "by_tokens": values,
        "floor": floor,
        "ceiling": held_out.compared(np.stack(list(ruined(held_out.images)))),
    }


def solver_values(pipeline: DARPipeline, held_out: HeldOut, *, solvers: Sequence[str], steps: Sequence[int]) -> Values:
    """Reconstructions from all that a solver reads, by its rule and number of steps."""
    token_ids = torch.cat([pipeline.encode(images) for _, images in held_out.batches()])
    values = {}
    for solver in solvers:
        for number in steps:
            begin, parts = time.perf_counter(), []
            for start in range(0, len(held_out), BATCH):
                found = pipeline.decode(
                    token_ids[start : start + BATCH],
                    num_inference_steps=number,
                    solver=cast(Solver, solver),
                    seed=0,
                    image_index=start,
                    output_type="latent",
                )
                parts.append(to_uint8(torch.as_tensor(found)))
            seconds = time.perf_counter() - begin
            name = f"{solver}, {number} steps"
            values[name] = held_out.compared(np.concatenate(parts))
            values[name]["ms per image"] = [1000 * seconds / len(held_out)]
    return {
        "images": len(held_out),
        "by_solver": values,
        "trained_steps": _own_steps(pipeline),
        "timed_on": timing_words(pipeline.device),
    }


def order_values(pipeline: DARPipeline, held_out: HeldOut) -> Values:
    """Bits of every token of held-out images: means by position, and by group with the ends of their 95 % interval."""
    parts = [
        pipeline.bits_per_token(images, list(held_out.model_ids[start : start + BATCH]))
        for start, images in held_out.batches()
    ]
    bits = torch.cat(parts).cpu().double().numpy()
    size = pipeline.image_tokenizer.tokens_per_group
    groups = [bits[:, start : start + size].mean(axis=1) for start in range(0, bits.shape[1], size)]
    return {
        "images": len(bits),
        "tokens_per_group": size,
        "by_position": bits.mean(axis=0).tolist(),
        "by_group": [mean_and_interval(group) for group in groups],
        "all": mean_and_interval(bits.mean(axis=1)),
    }


def _own_steps(pipeline: DARPipeline) -> str:
    config = pipeline.scheduler.config
    return f"{config['solver']}, {config['num_inference_steps']} steps"
