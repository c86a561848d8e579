"""`isthmus demo`."""

from collections.abc import Sequence

from isthmus.cli.parsing import parse
from isthmus.demo.options import DemoOptions


def run(arguments: Sequence[str]) -> None:
    """Run the demo."""
    options = parse(DemoOptions, arguments, prog="isthmus demo")
    # imported here: --help does without
    from isthmus.demo.run import run_demo

    run_demo(options)
