"""Which schedules a student can have, how it gets there, and where its teacher can be asked: side lengths alone.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion", scale distillation (no details are published);
spec of SRDD, 3.3. This file does not import torch: the command line reads it.
"""

from collections.abc import Sequence
from itertools import pairwise

from isthmus.errors import UserError
from isthmus.functional.guidance import Guidance, GuidanceSchedule


def check_student_sizes(teacher_sizes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """The sides of a student's scales, as a tuple: some of the teacher's, its first and its last among them.

    The first scale is drawn from the class alone, from a table that belongs to that side; the last is the latent grid;
    and the tokenizer quantises a side with the phi that the parent schedule gives it.

    Raises:
        UserError: a side is not the teacher's, an end is missing, or the sides do not increase.

    >>> check_student_sizes((1, 2, 3, 4, 6, 8), [1, 3, 8])
    (1, 3, 8)
    """
    sizes, teacher_sizes = tuple(sizes), tuple(teacher_sizes)
    allowed = set(sizes) <= set(teacher_sizes) and sizes == tuple(sorted(set(sizes)))
    if not allowed or not sizes or (sizes[0], sizes[-1]) != (teacher_sizes[0], teacher_sizes[-1]):
        raise UserError(
            f"a student's scale_sizes must be some of the teacher's, {_listed(teacher_sizes)}, increasing, with the "
            f"first and the last: the tokenizer has no phi for other sides and the teacher no rows. Got "
            f"{_listed(sizes) or 'none'}. Nearest: {_listed(nearest_sizes(teacher_sizes, sizes))}."
        )
    return sizes


def nearest_sizes(teacher_sizes: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """The student schedule nearest to what was asked for: every side replaced by the teacher's nearest.

    >>> nearest_sizes((1, 2, 3, 4, 6, 8), (2, 3, 7, 16))
    (1, 2, 3, 6, 8)
    """
    found = {min(teacher_sizes, key=lambda side, asked=asked: abs(side - asked)) for asked in sizes}
    return tuple(sorted(found | {teacher_sizes[0], teacher_sizes[-1]}))


def removal_stages(teacher_sizes: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Schedules on the way from the teacher's to `sizes`, one scale removed at a time, the finest first.

    The last is `sizes`, which is also the only one where nothing is removed.

    >>> removal_stages((1, 2, 3, 4), (1, 4))
    ((1, 2, 4), (1, 4))
    """
    stages, current = [], tuple(teacher_sizes)
    for side in sorted(set(teacher_sizes) - set(sizes), reverse=True):
        current = tuple(s for s in current if s != side)
        stages.append(current)
    return tuple(stages) or (tuple(sizes),)


def shared_steps(teacher_sizes: Sequence[int], sizes: Sequence[int], *, markov: bool) -> tuple[int, ...]:
    """The student's scales at which its own input is one that the teacher knows.

    markov (the teacher): those whose predecessor is the same in both schedules; the input is all that it reads.
    Causal: the leading scales that both have, since it also reads the keys of every earlier scale.

    >>> shared_steps((1, 2, 3, 4, 6), (1, 3, 4, 6), markov=True), shared_steps((1, 2, 3, 4), (1, 2, 4), markov=False)
    ((0, 2, 3), (0, 1))
    """
    before = {side: previous for previous, side in pairwise((None, *teacher_sizes))}
    same = [before[side] == previous for previous, side in pairwise((None, *sizes))]
    if markov:
        return tuple(k for k, shared in enumerate(same) if shared)
    return tuple(k for k in range(len(same)) if all(same[: k + 1]))


def guidance_at(guidance: Guidance, teacher_sizes: Sequence[int], sizes: Sequence[int]) -> Guidance:
    """Guidance of a student: one value per scale of its teacher is read at the student's sides; other kinds stay.

    Raises:
        UserError: there are several values, and not one per scale of the teacher.

    >>> guidance_at((1, 2, 3), (1, 2, 4), (1, 4)), guidance_at(2.0, (1, 2, 4), (1, 4))
    ((1, 3), 2.0)
    """
    if isinstance(guidance, (int, float, GuidanceSchedule)):
        return guidance
    if len(guidance) != len(teacher_sizes):
        raise UserError(
            f"guidance by scale needs one value for each of the teacher's scales ({_listed(teacher_sizes)}), got "
            f"{len(guidance)}. Pass {len(teacher_sizes)} numbers, one number, or a schedule such as linear:1:2.5."
        )
    by_side = dict(zip(teacher_sizes, guidance, strict=True))
    return tuple(by_side[side] for side in sizes)


def _listed(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))
