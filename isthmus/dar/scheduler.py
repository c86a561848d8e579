"""Flow matching from noise (t = 0) to image (t = 1): times, the tokens that drive each step, and the solver.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1 (spec of D-AR, 1.5 to 1.7). Everything is
fp32: a time in bf16 is visibly wrong once it is multiplied by a thousand.
"""

from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.dar.options import Solver
from isthmus.errors import UserError
from isthmus.nn.saved_model import Recorded, records_arguments
from isthmus.nn.shapes import Images


def velocity_towards(image: Images, x_t: Images, t: Float[Tensor, " _"], *, shortest: float = 0.1) -> Images:
    """Velocity that leads from x_t to `image` in the time left, which is taken to be at least `shortest`."""
    return (image - x_t) / (1 - t).clamp(min=shortest).view(-1, 1, 1, 1)


def time_waves(t: Float[Tensor, " n"], width: int) -> Float[Tensor, "n width"]:
    """Cosines, then sines, of 1000 t at width / 2 frequencies from 1 down to 1/10000 (exclusive)."""
    exponents = torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2)
    angles = 1000 * t.float()[:, None] * 10_000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def tokens_of_step(num_tokens: int, num_groups: int, tokens_per_step: int | None) -> int:
    """Tokens that drive a solver step (None: one group); UserError where the numbers do not fit each other."""
    if num_groups <= 0 or num_tokens % num_groups:
        raise UserError(f"num_tokens must be a multiple of num_groups, got {num_tokens} and {num_groups}.")
    group = num_tokens // num_groups
    if tokens_per_step is not None and not group <= tokens_per_step <= num_tokens:
        raise UserError(
            f"tokens_per_step must lie in {group}..{num_tokens} (a group .. all tokens), got {tokens_per_step}. "
            "None takes one group."
        )
    return group if tokens_per_step is None else tokens_per_step


SOLVERS: tuple[str, ...] = get_args(Solver)


class FlowMatchingScheduler(Recorded):
    """Straight paths from noise (t = 0) to image (t = 1), walked in steps that groups of tokens drive in turn.

    It owns `data_std`, the factor between images in [-1, 1] and the states of the diffusion, and it is the only place
    where the unshifted time `raw_t` appears. It holds no state: a solver's history is an argument.

    Args:
        num_inference_steps: solver steps of an image, where a call does not say.
        num_groups: groups that the tokens fall into.
        tokens_per_step: tokens that drive a step; None is one group, more are overlapping windows.
        time_shift: more than 1 spends more of the time near noise: t = raw / (raw + shift (1 - raw)).
        data_std: factor on images before noise is mixed in: states are t * data_std * image + (1 - t) * noise.
        solver: "euler"; "adams-bashforth", the published two-step rule 1.5 v - 0.5 v_previous, whose coefficients are
            those of an even grid; or "adams-bashforth-variable", with the coefficients that the uneven grid asks for.
            The two-step rules begin with a step of Euler.

    Raises UserError where an argument is out of its range.

    >>> FlowMatchingScheduler(num_inference_steps=5, num_tokens=32).windows()
    ((0, 4), (8, 12), (12, 16), (20, 24), (24, 28))
    """

    @records_arguments
    def __init__(
        self,
        *,
        num_inference_steps: int = 8,
        num_groups: int = 8,
        num_tokens: int = 256,
        tokens_per_step: int | None = None,
        time_shift: float = 2.0,
        data_std: float = 0.6,
        solver: Solver = "adams-bashforth",
    ):
        self.tokens_per_step = tokens_of_step(num_tokens, num_groups, tokens_per_step)
        if time_shift <= 0 or data_std <= 0:
            raise UserError(f"time_shift and data_std must be positive, got {time_shift} and {data_std}.")
        self._steps(num_inference_steps)
        self.chosen(solver)

    def shift(self, raw_t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Shifted times raw / (raw + time_shift (1 - raw)) of raw ones, both in [0, 1]."""
        return raw_t / (raw_t + self.config.time_shift * (1 - raw_t))

    def times(self, num_inference_steps: int | None = None) -> Float[Tensor, " steps_and_end"]:
        """Shifted time of every step, and 1 at the end: (S + 1,), fp32, on the CPU."""
        return torch.tensor(self._grid(num_inference_steps), dtype=torch.float32, device="cpu")

    def windows(self, num_inference_steps: int | None = None) -> tuple[tuple[int, int], ...]:
        """The tokens [start, end) that drive each step: the group nearest in raw time, rounded up in the middle."""
        steps, groups, tokens = self._steps(num_inference_steps), self.config["num_groups"], self.config["num_tokens"]
        # in integers: raw_t * groups + 1/2 = (2 i groups + steps) / (2 steps), with nothing rounded
        nearest = ((2 * i * groups + steps) // (2 * steps) for i in range(steps))
        starts = [min(group * (tokens // groups), tokens - self.tokens_per_step) for group in nearest]
        return tuple((start, start + self.tokens_per_step) for start in starts)

    def window_of(self, raw_t: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """First token of the window that drives raw time in [0, 1] (training draws it at random)."""
        groups, tokens = self.config["num_groups"], self.config["num_tokens"]
        group = (raw_t.float() * groups + 0.5).floor().long()
        return (group * (tokens // groups)).clamp(max=tokens - self.tokens_per_step)

    def add_noise(self, image: Images, noise: Images, t: Float[Tensor, " b"]) -> Images:
        """State of images in [-1, 1] at shifted times: t * data_std * image + (1 - t) * noise."""
        return torch.lerp(noise, image * self.config.data_std, t.view(-1, 1, 1, 1))

    def velocity_target(self, image: Images, noise: Images) -> Images:
        """What the decoder learns: data_std * image - noise, the same at every time."""
        return image * self.config["data_std"] - noise

    def jump(self, x_t: Images, velocity: Images, t: Float[Tensor, " _"]) -> Images:
        """Where the path from x_t ends, not clamped: (x_t + (1 - t) velocity) / data_std; one t, or one each."""
        return self.to_image(torch.addcmul(x_t, 1 - t.view(-1, 1, 1, 1), velocity))

    def step(
        self,
        velocity: Images,
        previous_velocity: Images | None,
        index: int,
        x_t: Images,
        *,
        num_inference_steps: int | None = None,
        solver: Solver | None = None,
        to_end: bool = False,
    ) -> Images:
        """The state after step `index`, from the state before it and the decoder's velocity at `times()[index]`.

        `previous_velocity` None takes a step of Euler, as the first step that is executed must, wherever it starts.
        `num_inference_steps` is of the whole way. `to_end` takes the same rule straight to t = 1, which is the
        published preview. Raises UserError where there is no such step or solver.
        """
        grid = self._grid(num_inference_steps)
        if not 0 <= index < len(grid) - 1:
            raise UserError(f"index must be a step in 0..{len(grid) - 2}, got {index}.")
        solver, length = self.chosen(solver), (1.0 if to_end else grid[index + 1]) - grid[index]
        if solver == "euler" or previous_velocity is None:
            return x_t.float() + length * velocity.float()
        # v extrapolated to the middle of the step: v + (v - v_previous) * half this step / the step before
        ratio = 0.5 if solver == "adams-bashforth" else 0.5 * length / (grid[index] - grid[index - 1])
        slope = (1 + ratio) * velocity.float() - ratio * previous_velocity.float()
        return x_t.float() + length * slope

    def to_image(self, x: Images) -> Images:
        """State at t = 1 to an image in [-1, 1], not clamped."""
        return x / self.config["data_std"]

    def _grid(self, num_inference_steps: int | None) -> tuple[float, ...]:
        steps = self._steps(num_inference_steps)
        raw_t = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        return tuple(self.shift(raw_t).tolist())

    def _steps(self, num_inference_steps: int | None) -> int:
        steps = self.config["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise UserError(f"num_inference_steps must be at least 1, got {steps}.")
        return steps

    def chosen(self, solver: Solver | None) -> Solver:
        """The rule of a call, None being the scheduler's own; UserError where there is no such rule."""
        solver = self.config["solver"] if solver is None else solver
        if solver not in SOLVERS:
            raise UserError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}.")
        return solver
