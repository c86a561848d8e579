"""`isthmus export llama`: the prior of a D-AR model as a folder that any reader of Llamas loads."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from isthmus.cli.parsing import parse

logger = logging.getLogger("isthmus")


@dataclass(frozen=True, kw_only=True)
class ExportLlama:
    """The Llama of a D-AR model for stock transformers, vLLM or SGLang; the folder's README has their exact flags."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A pipeline folder (a trained run, a converted checkpoint) or a hub id."""
    out: Path
    """The folder to write; new or empty."""


def run_llama(arguments: Sequence[str]) -> None:
    """Write the folder, whole or not at all."""
    command = parse(ExportLlama, arguments, prog="isthmus export llama")
    # imported here: --help does without
    from isthmus.exporting import export_llama

    export_llama(command.model, command.out)
    logger.info("Llama written to %s; its README says how to load and serve it", command.out)
