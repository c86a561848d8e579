"""`isthmus study srdd` and `isthmus study dar`."""

from collections.abc import Sequence

from isthmus.cli.parsing import parse
from isthmus.studies.dar_options import DAR_BUDGETS, DarStudyOptions, dar_setting
from isthmus.studies.srdd_options import SRDD_BUDGETS, SrddStudyOptions, srdd_setting


def run_srdd(arguments: Sequence[str]) -> None:
    """Run the study of next-scale models."""
    options = parse(SrddStudyOptions, arguments, prog="isthmus study srdd")
    # imported here: --help does without
    from isthmus.studies.running import run_study
    from isthmus.studies.srdd import SRDD_STUDY

    run_study(SRDD_STUDY, options, SRDD_BUDGETS, srdd_setting)


def run_dar(arguments: Sequence[str]) -> None:
    """Run the study of D-AR."""
    options = parse(DarStudyOptions, arguments, prog="isthmus study dar")
    # imported here: --help does without
    from isthmus.studies.dar import DAR_STUDY
    from isthmus.studies.running import run_study

    run_study(DAR_STUDY, options, DAR_BUDGETS, dar_setting)
