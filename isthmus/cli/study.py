"""`isthmus study srdd` and `isthmus study dar`."""

from collections.abc import Sequence

from isthmus.cli.parsing import parse
from isthmus.studies.dar_options import DarStudyOptions
from isthmus.studies.srdd_options import SrddStudyOptions


def run_srdd(arguments: Sequence[str]) -> None:
    """Run the study of next-scale models."""
    options = parse(SrddStudyOptions, arguments, prog="isthmus study srdd")
    # imported here: --help does without
    from isthmus.studies.srdd import run_srdd_study

    run_srdd_study(options)


def run_dar(arguments: Sequence[str]) -> None:
    """Run the study of D-AR."""
    options = parse(DarStudyOptions, arguments, prog="isthmus study dar")
    # imported here: --help does without
    from isthmus.studies.dar import run_dar_study

    run_dar_study(options)
