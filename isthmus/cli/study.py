"""`isthmus study` and `isthmus demo`."""

from collections.abc import Sequence

from isthmus.cli.options import parse
from isthmus.demo.options import DemoOptions
from isthmus.studies.options import DarStudyOptions, SrddStudyOptions


def run_srdd(arguments: Sequence[str]) -> None:
    """Run the study of next-scale models."""
    options = parse(SrddStudyOptions, arguments, prog="isthmus study srdd")
    from isthmus.studies.srdd import SRDD_STUDY
    from isthmus.studies.study import run_study

    run_study(SRDD_STUDY, options)


def run_dar(arguments: Sequence[str]) -> None:
    """Run the study of D-AR."""
    options = parse(DarStudyOptions, arguments, prog="isthmus study dar")
    from isthmus.studies.dar import DAR_STUDY
    from isthmus.studies.study import run_study

    run_study(DAR_STUDY, options)


def run_demo_command(arguments: Sequence[str]) -> None:
    """Run the demo."""
    options = parse(DemoOptions, arguments, prog="isthmus demo")
    from isthmus.demo.run import run_demo

    run_demo(options)
