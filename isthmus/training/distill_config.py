"""The run of a scale distillation. This file imports nothing heavy: the command line is derived from it."""

from dataclasses import dataclass
from typing import Literal

from isthmus.training.config import TokensRun, check_not_negative


@dataclass(frozen=True, kw_only=True)
class DistillRun(TokensRun):
    """`isthmus distill`; `from_model` is the teacher."""

    scale_sizes: tuple[int, ...] | None = None
    """Sides of the student's scales: some of the teacher's, with its first and its last; None keeps them all."""
    scale_attention: Literal["causal", "markov"] | None = None
    """The student's mask; None keeps the teacher's."""
    progressive: bool = False
    """Remove one scale at a time, the finest first; each student teaches the next, num_steps each."""
    distillation_weight: float = 1.0
    """Weight of what the teacher says beside the cross-entropy on data tokens; 0 trains without a teacher."""
    scale_loss: Literal["token-uniform", "lognormal"] = "token-uniform"
    """Weights over scales of both losses: the same for every token, or a log-normal bump."""
    baseline: bool = True
    """Also train the same student without the teacher, as long: it doubles the cost, and nothing else tells whether the
    teacher helped. Not done where the student has none itself (distillation_weight 0, all scales removed at once)."""

    def __post_init__(self):
        super().__post_init__()
        check_not_negative(self, "distillation_weight")
