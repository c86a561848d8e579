"""A student on fewer scales, or under another mask, that starts as its teacher (spec of SRDD, 3.3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.scale_distillation import check_student_sizes
from isthmus.models.next_scale_transformer import NextScaleTransformer


def student_of(teacher: NextScaleTransformer, scale_sizes: Sequence[int], scale_attention: str) -> NextScaleTransformer:
    """A transformer on `scale_sizes` with the teacher's weights.

    Raises:
        UserError: the sides are not some of the teacher's with its first and its last.
    """
    sizes = check_student_sizes(teacher.schedule.sizes, scale_sizes)
    arguments: dict[str, Any] = {k: v for k, v in teacher.config.items() if not k.startswith("_")}
    student = NextScaleTransformer(**(arguments | {"scale_sizes": sizes, "scale_attention": scale_attention}))
    student.load_state_dict(rows_by_side(teacher.state_dict(), teacher.schedule, student.schedule))
    return student


def rows_by_side(weights: Mapping[str, Tensor], schedule: ScaleSchedule, shorter: ScaleSchedule) -> dict[str, Tensor]:
    """Weights for `shorter`: of the tables of scales and positions the rows of its sides, all else as it is."""
    kept = [schedule.sizes.index(side) for side in shorter.sizes]
    positions = weights["position"].split(list(schedule.lengths), dim=1)
    tables = {
        "scale_embedding.weight": weights["scale_embedding.weight"][kept],
        "position": torch.cat([positions[k] for k in kept], dim=1),
    }
    return {**weights, **tables}
