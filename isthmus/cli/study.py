"""`isthmus study` and `isthmus demo`."""

from collections.abc import Sequence
from functools import partial

from isthmus.cli.options import parse
from isthmus.demo.options import DemoOptions
from isthmus.registry import imported
from isthmus.studies.options import DarStudyOptions, SrddStudyOptions, StudyOptions, TextStudyOptions


def _study(name: str, place: str, kind: type[StudyOptions], arguments: Sequence[str]) -> None:
    options = parse(kind, arguments, prog=f"isthmus study {name}")
    from isthmus.studies.study import run_study

    run_study(imported(place), options)


run_srdd = partial(_study, "srdd", "isthmus.studies.srdd:SRDD_STUDY", SrddStudyOptions)
run_dar = partial(_study, "dar", "isthmus.studies.dar:DAR_STUDY", DarStudyOptions)
run_text = partial(_study, "text", "isthmus.studies.text:TEXT_STUDY", TextStudyOptions)


def run_demo_command(arguments: Sequence[str]) -> None:
    """Run the demo."""
    options = parse(DemoOptions, arguments, prog="isthmus demo")
    from isthmus.demo.run import run_demo

    run_demo(options)
