"""`isthmus train critic`: a judge of drawn tokens, for draws that are refined."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from isthmus.cli.parsing import parse
from isthmus.training.critic_config import CriticRun

logger = logging.getLogger("isthmus")


@dataclass(frozen=True, kw_only=True)
class TrainCritic(CriticRun):
    """Train a critic for a next-scale model, and write the model with it. Its draws are then refined by the critic."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]  # pyright: ignore[reportGeneralTypeIssues] # required here
    """The model it is to judge: a pipeline folder or hub id."""
    out: Path  # pyright: ignore[reportGeneralTypeIssues] # required here
    """New folder for the model with its critic."""


def run(arguments: Sequence[str]) -> None:
    """Train and save."""
    command = parse(TrainCritic, arguments, prog="isthmus train critic")
    # imported here: --help does without
    from isthmus.training.train_critic import train_critic

    logger.info("done: %s", train_critic(CriticRun(**asdict(command))))
