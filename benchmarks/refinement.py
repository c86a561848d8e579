"""What rounds cost: python benchmarks/refinement.py MODEL

Interleaved rounds of plain, masked and jumping draws of a next-scale model, unguided, without pixels, as ratios to the
plain draw. Beside each the ratio of the floating-point operations of the scales that it predicts, from the sizes of the
model (a round on a scale of four tokens is nothing beside the last scale), and of the forwards.
"""

import argparse

import torch
from measure import both, interleaved, machine

from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.refinement import ScaleRefinementScheduler
from isthmus.next_scale.transformer import sampling_flops
from isthmus.pipelines.loading import load_pipeline


def schedulers(num_scales: int) -> dict[str, ScaleRefinementScheduler | None]:
    """The usual rounds, and one at the last scale, where it costs most."""
    last = (0,) * (num_scales - 1) + (1,)
    return {
        "plain": None,
        "masked": ScaleRefinementScheduler(mode="masked"),
        "masked, last scale": ScaleRefinementScheduler(mode="masked", rounds=last),
        "jumps": ScaleRefinementScheduler(mode="simple"),
        "jump, last scale": ScaleRefinementScheduler(mode="simple", rounds=last),
    }


def scale_flops(pipe: NextScalePipeline) -> list[int]:
    """Operations of a forward of every scale: what it adds to those of the scales before it."""
    config, sizes = pipe.transformer.config, pipe.schedule.sizes

    def up_to(count: int) -> int:
        return sampling_flops({**config, "scale_sizes": sizes[:count]})

    modulations = up_to(0)
    return [up_to(k + 1) - up_to(k) if k else up_to(1) - modulations for k in range(len(sizes))]


def repeated(scheduler: ScaleRefinementScheduler | None, num_scales: int) -> list[int]:
    """How often every scale is predicted again, but for what a causal model reads again after a jump."""
    again = [0] * num_scales
    for scale, count in enumerate((0,) * num_scales if scheduler is None else scheduler.rounds_of(num_scales)):
        first = scale if scheduler is None or scheduler.mode == "masked" else scale + 1 - scheduler.jump_scales
        for one in range(first, scale + 1):
            again[one] += count
    return again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--num", type=int, default=16, help="images at once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pipe = load_pipeline(given.model, device="cpu")
    labels = [i % pipe.num_classes for i in range(given.num)] if pipe.num_classes else [None] * given.num
    forwards: dict[str, int] = {}

    def draw(name: str, scheduler: ScaleRefinementScheduler | None) -> None:
        pipe.scheduler = scheduler
        forwards[name] = pipe(labels, guidance_scale=1.0, seed=0, output_type="latent").num_forwards

    asked = schedulers(pipe.schedule.num_scales)
    runs = {name: (lambda name=name, one=one: draw(name, one)) for name, one in asked.items()}
    times = interleaved(runs, given.rounds)
    costs = scale_flops(pipe)
    print(machine())
    print(f"{given.num} images, medians of {given.rounds} interleaved rounds; ratios to the plain draw, wall / CPU\n")
    print(f"{'draw':<20} {'ms, wall / CPU':>20} {'time':>14} {'operations':>12} {'forwards':>10}")
    for name, scheduler in asked.items():
        extra = sum(count * cost for count, cost in zip(repeated(scheduler, len(costs)), costs, strict=True))
        shown = both(times[name].ratio(times["plain"]), ".2f")
        ratio, number = 1 + extra / sum(costs), forwards[name] / forwards["plain"]
        print(f"{name:<20} {times[name].milliseconds():>20} {shown:>14} {ratio:>12.2f} {number:>10.2f}")


if __name__ == "__main__":
    main()
