"""`isthmus convert var`: published weights to a pipeline folder."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.cli.parsing import parse
from isthmus.errors import UserError

logger = logging.getLogger("isthmus")


@dataclass(frozen=True, kw_only=True)
class ConvertVar:
    """Published VAR weights (.pth or .safetensors; bare, nested or EMA) to a pipeline folder.

    Sizes are read off the files. Every key that is not needed is listed with its reason; a key that is unknown or
    missing is an error.
    """

    tokenizer: Path
    """The VQVAE file, such as vae_ch160v4096z32.pth."""
    prior: Path
    """The transformer file, such as var_d16.pth."""
    out: Path
    """The pipeline folder to write; new or empty."""
    scale_attention: Literal["causal", "markov"] = "causal"
    """markov imports the weights as the start of SRDD fine-tuning."""
    class_names: Path | None = None
    """Text file with one class name per line, in the order of the class ids."""


def run_var(arguments: Sequence[str]) -> None:
    """Convert and write."""
    command = parse(ConvertVar, arguments, prog="isthmus convert var")
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise UserError(f"--out must be new or empty, got {command.out}. Choose another folder or remove it.")
    # imported here: --help does without
    from isthmus.converting import convert_var

    converted = convert_var(
        command.tokenizer,
        command.prior,
        scale_attention=command.scale_attention,
        class_names=_read_names(command.class_names),
    )
    _report_dropped("tokenizer", converted.dropped_tokenizer_keys)
    _report_dropped("prior", converted.dropped_prior_keys)
    converted.pipeline.save_pretrained(command.out)
    logger.info("pipeline written to %s; draw with `isthmus sample %s --out samples`", command.out, command.out)


def _read_names(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise UserError(f"--class-names must be a text file, got {path}, which is none.")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _report_dropped(what: str, dropped: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, reason in dropped.items():
        by_reason[reason].append(key)
    for reason, keys in by_reason.items():
        logger.info("%s: left out %s (%s)", what, ", ".join(sorted(keys)), reason)
