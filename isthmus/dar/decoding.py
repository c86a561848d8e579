"""Pixels of the D-AR family: a solver step runs as soon as the tokens of its window exist, before later ones do.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1 (spec of D-AR, 1.7).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.dar.decoder import FlowDecoder, KeysValues
from isthmus.dar.options import Solver
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
from isthmus.errors import UserError
from isthmus.nn.draws import NOISE, stream
from isthmus.nn.shapes import Images

Preview = Literal["jump", "solver"]


@dataclass
class FlowStep:
    """One finished solver step, `index` (from 0) of `total`."""

    index: int
    total: int
    token_ids: Int[Tensor, "b n"]
    """What came in since the step before; n may be 0."""
    x: Images
    """State after the step, in the scale of the scheduler."""
    preview: Images
    """The images if this step were the last, not clamped."""


@dataclass(frozen=True)
class SolverPlan:
    """The steps that will run, and how many tokens each of them waits for."""

    windows: tuple[tuple[int, int], ...]
    """Tokens [start, end) that drive each step of the whole way."""
    needed: tuple[int, ...]
    """Tokens that exist when a step runs: the end of its window, in whole groups."""
    first: int
    """The step that runs first; later than 0 where the diffusion starts from an image."""
    solver: Solver

    @property
    def total(self) -> int:
        """Number of steps of the whole way."""
        return len(self.windows)

    @property
    def stops(self) -> tuple[int, ...]:
        """Numbers of tokens at which a step can run, increasing: where a prior hands over what it has drawn."""
        return tuple(sorted(set(self.needed[self.first :])))

    @classmethod
    def of(
        cls,
        scheduler: FlowMatchingScheduler,
        *,
        num_inference_steps: int | None = None,
        solver: Solver | None = None,
        first: int = 0,
    ) -> "SolverPlan":
        """The plan of a scheduler; None takes its own number of steps and rule. UserError where there is no such.

        >>> plan = SolverPlan.of(FlowMatchingScheduler(num_tokens=32), num_inference_steps=5)
        >>> plan.windows[:3], plan.stops
        (((0, 4), (8, 12), (12, 16)), (4, 12, 16, 24, 28))
        """
        group = scheduler.config["num_tokens"] // scheduler.config["num_groups"]
        windows = scheduler.windows(num_inference_steps)
        needed = tuple(-(-end // group) * group for _, end in windows)
        return cls(windows, needed, first, scheduler.chosen(solver))


def image_noise(image_seeds: Sequence[tuple[int, int]], height: int, width: int) -> Images:
    """Standard normal noise per image, from its own (seed, image index) alone; fp32, on the CPU."""
    shape = (3, height, width)
    rows = [stream(seed, NOISE, index).standard_normal(shape, dtype=np.float32) for seed, index in image_seeds]
    return torch.from_numpy(np.stack(rows))


def flow_steps(
    image_tokenizer: DiffusionTokenizer,
    decoder: FlowDecoder,
    scheduler: FlowMatchingScheduler,
    plan: SolverPlan,
    token_ids: Iterable[Int[Tensor, "b _"]],
    x: Images,
    *,
    preview: Preview = "jump",
) -> Iterator[FlowStep]:
    """Walk from `x` to images, each step as soon as its tokens have come.

    A new group costs the causal stack and the decoder's keys and values on that group alone.

    Args:
        token_ids: parts of the sequence, one for each of `plan.stops`, from token 0 on. The next part is asked for only
            when a step needs it.
        x: state at the time of the first step: noise, or `scheduler.add_noise` of images.
        preview: "jump" shows x_t + (1 - t) velocity; "solver" the published rule, the solver's own step to t = 1.
    """
    parts, times = iter(token_ids), scheduler.times(plan.total)
    with torch.no_grad():
        embedded = decoder.embed_times(times[:-1])
    x, times = x.to(decoder.device).float(), times.to(decoder.device)
    cache, keys, canvas = image_tokenizer.new_cache(len(x)), WindowKeys(decoder), None
    rule = {"num_inference_steps": plan.total, "solver": plan.solver}
    previous_velocity = None
    for index in range(plan.first, plan.total):
        start, end = plan.windows[index]
        keys.forget_before(start)
        arrived = [torch.empty(len(x), 0, dtype=torch.long, device=decoder.device)]
        # left before the yield: around it, it would also hold for whoever reads the steps
        with torch.no_grad():
            while cache.length < plan.needed[index]:
                arrived.append(next(parts).to(decoder.device))
                first, condition = cache.length, image_tokenizer.condition(arrived[-1], cache)
                keys.add(condition)
                painted = decoder.paint(condition, first)
                if painted is not None:
                    canvas = painted.sum(dim=1) + (0 if canvas is None else canvas)
            velocity = decoder.velocity(x, embedded.at(index), keys.window(end), canvas).float()
            following = scheduler.step(velocity, previous_velocity, index, x, **rule)
            if index == plan.total - 1:
                shown = scheduler.to_image(following)
            elif preview == "jump":
                shown = scheduler.jump(x, velocity, times[index : index + 1])
            else:
                shown = scheduler.to_image(scheduler.step(velocity, previous_velocity, index, x, **rule, to_end=True))
        previous_velocity, x = velocity, following
        yield FlowStep(index, plan.total, torch.cat(arrived, dim=1), x.clone(), shown)


class WindowKeys:
    """Keys and values of the decoder's cross-attention for the tokens [start, length), each computed once."""

    def __init__(self, decoder: FlowDecoder):
        self.decoder, self.start, self.length = decoder, 0, 0
        self.blocks: tuple[KeysValues, ...] = ()

    def forget_before(self, start: int) -> None:
        """Tokens before `start` drive no later step."""
        held = slice(start - self.start, None)
        self.blocks = tuple((k[:, :, held], v[:, :, held]) for k, v in self.blocks) if start < self.length else ()
        self.start = start

    def add(self, condition: Float[Tensor, "b n condition_width"]) -> None:
        """Conditions of the next tokens; those that no later step reads cost nothing."""
        unread, self.length = max(self.start - self.length, 0), self.length + condition.shape[1]
        if self.start < self.length:
            new = self.decoder.attend_to(condition[:, unread:])
            if self.blocks:
                pairs = zip(self.blocks, new, strict=True)
                new = tuple((torch.cat([k, a], dim=2), torch.cat([v, b], dim=2)) for (k, v), (a, b) in pairs)
            self.blocks = new

    def window(self, end: int) -> tuple[KeysValues, ...]:
        """Per block, keys and values of the tokens [start, end)."""
        held = slice(end - self.start)
        return tuple((k[:, :, held], v[:, :, held]) for k, v in self.blocks)


def decode_tokens(
    image_tokenizer: DiffusionTokenizer,
    decoder: FlowDecoder,
    scheduler: FlowMatchingScheduler,
    token_ids: Int[Tensor, "b n"],
    x: Images,
    *,
    plan: SolverPlan,
) -> Images:
    """Images, not clamped, from tokens that all exist, as `flow_steps`; UserError where the last step needs more."""
    if token_ids.shape[1] < plan.stops[-1]:
        raise UserError(
            f"{plan.total} solver steps need {plan.stops[-1]} tokens, got {token_ids.shape[1]}. "
            "Pass all tokens of the images."
        )
    parts = (token_ids[:, start:end] for start, end in pairwise((0, *plan.stops)))
    *_, last = flow_steps(image_tokenizer, decoder, scheduler, plan, parts, x)
    return last.preview
