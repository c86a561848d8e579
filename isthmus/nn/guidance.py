"""Guidance as a function of the step. One convention everywhere: guided = uncond + s (cond - uncond), s = 1 is off.

VAR's "cfg = c" is `GuidanceSchedule("linear", 1, 1 + c)`. This file does not import torch: the command line reads it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from isthmus.errors import UserError


@dataclass(frozen=True)
class GuidanceSchedule:
    """Guidance by step k of K.

    linear: start + (end - start) k / (K - 1); cosine: start + (end - start) (1 - cos(pi k / (K - 1))) / 2;
    constant: `end`. One step alone takes `end`. Before `first_guided_step` and after `last_guided_step` (both count
    from 0) the value is 1; None guides to the end.

    >>> GuidanceSchedule("linear", 1.0, 3.0, last_guided_step=1).values(3)
    (1.0, 2.0, 1.0)
    >>> GuidanceSchedule("constant", end=3.0, first_guided_step=2).values(3)
    (1.0, 1.0, 3.0)
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    start: float = 1.0
    end: float = 1.0
    last_guided_step: int | None = None
    first_guided_step: int = 0

    def __post_init__(self):
        if self.kind not in ("constant", "linear", "cosine"):
            raise UserError(f"guidance kind must be constant, linear or cosine, got {self.kind!r}. Pick one of these.")
        for value in (self.start, self.end):
            _checked(value)
        first, last = self.first_guided_step, self.last_guided_step
        if first < 0 or (first > 0 and last is not None and last < first):
            raise UserError(
                f"guidance needs a first step from 0 and none after its last, got {first} to {last}. 1 turns it off."
            )

    def at(self, position: float) -> float:
        """Value at a relative position in [0, 1] of the run (0 = first step, 1 = last step)."""
        if self.kind == "constant":
            return self.end
        ramp = position if self.kind == "linear" else (1 - math.cos(math.pi * position)) / 2
        return self.start + (self.end - self.start) * ramp

    def values(self, num_steps: int) -> tuple[float, ...]:
        """One value per step."""
        positions = [1.0] if num_steps == 1 else [k / (num_steps - 1) for k in range(num_steps)]
        last = num_steps - 1 if self.last_guided_step is None else self.last_guided_step
        return tuple(
            self.at(position) if self.first_guided_step <= k <= last else 1.0 for k, position in enumerate(positions)
        )

    def to_dict(self) -> dict[str, str | float | int | None]:
        """Plain values for JSON; a first guided step of 0 is left out, as before there were others."""
        return {name: value for name, value in asdict(self).items() if name != "first_guided_step" or value}


Guidance = float | int | Sequence[float] | GuidanceSchedule


def guidance_values(guidance_scale: Guidance, num_steps: int) -> tuple[float, ...]:
    """One value per step; UserError where one is not finite, or a sequence has another length than `num_steps`."""
    if isinstance(guidance_scale, GuidanceSchedule):
        return guidance_scale.values(num_steps)
    if isinstance(guidance_scale, (int, float)):
        return (_checked(guidance_scale),) * num_steps
    values = tuple(_checked(value) for value in guidance_scale)
    if len(values) != num_steps:
        raise UserError(
            f"guidance_scale as a sequence needs one value per step ({num_steps}), got {len(values)}. "
            "Pass one number for all steps, or a GuidanceSchedule."
        )
    return values


def _checked(value: float) -> float:
    if not math.isfinite(value):
        raise UserError(f"guidance_scale must be a finite number (1 = off), got {value}. Typical values are 1 to 5.")
    return float(value)


def guidance_at(guidance: Guidance, teacher_sizes: Sequence[int], sizes: Sequence[int]) -> Guidance:
    """Guidance of a student: one value per scale of its teacher is read at the student's sides; other kinds stay.

    Raises UserError where there are several values, and not one per scale of the teacher.

    >>> guidance_at((1, 2, 3), (1, 2, 4), (1, 4)), guidance_at(2.0, (1, 2, 4), (1, 4))
    ((1, 3), 2.0)
    """
    if isinstance(guidance, (int, float, GuidanceSchedule)):
        return guidance
    return at_sides("guidance", guidance, teacher_sizes, sizes)


def at_sides(
    what: str, values: float | Sequence[float], teacher_sizes: Sequence[int], sizes: Sequence[int]
) -> float | tuple[float, ...]:
    """Of one value per scale of a teacher, those of some of its scales; one number stays. UserError as `guidance_at`.

    >>> at_sides("temperature", (1.0, 1.0, 0.1), (1, 2, 4), (1, 4))
    (1.0, 0.1)
    """
    if isinstance(values, (int, float)):
        return values
    if len(values) != len(teacher_sizes):
        instead = "one number, or a schedule such as linear:1:2.5" if what == "guidance" else "or one number"
        raise UserError(
            f"{what} by scale needs one value for each of the teacher's scales ({listed(teacher_sizes)}), got "
            f"{len(values)}. Pass {len(teacher_sizes)} numbers, {instead}."
        )
    by_side = dict(zip(teacher_sizes, values, strict=True))
    return tuple(by_side[side] for side in sizes)


def listed(sizes: Sequence[int]) -> str:
    """Side lengths with commas between them."""
    return ",".join(map(str, sizes))
