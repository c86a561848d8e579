"""`isthmus convert` (published weights to a pipeline folder) and `isthmus export` (the Llama of a D-AR model)."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from isthmus.cli.options import parse
from isthmus.errors import UserError
from isthmus.files import check_writable, contents
from isthmus.training.arguments import arguments_of, given

logger = logging.getLogger("isthmus")


@dataclass(frozen=True, kw_only=True)
class ConvertVar:
    """Published VAR weights (.pth, .safetensors or shards; bare, nested or EMA) to a folder.

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


_Tokens = arguments_of(
    "isthmus.dar.tokenizer:DiffusionTokenizer", ["image_size", "num_tokens", "num_groups", "tokens_per_step"]
)
_Flow = arguments_of("isthmus.dar.scheduler:FlowMatchingScheduler", ["num_inference_steps", "time_shift", "data_std"])


@dataclass(frozen=True, kw_only=True)
class ConvertDar(_Tokens, _Flow):
    """Published D-AR weights (.pt, .safetensors or shards; bare, nested or EMA) to a folder.

    Layers and widths are read off the files. What shapes cannot tell comes from the settings in the tokenizer file;
    the options below take their place, and where there are neither, the published model's hold. Every key that is not
    needed is listed with its reason; a key that is unknown or missing is an error.
    """

    tokenizer: Path
    """The tokenizer file, such as D-AR-tokenizer_v1.pt, which also holds the pixel decoder."""
    prior: Path
    """The Llama's file, such as D-AR-L-360K.pt."""
    out: Path
    """The pipeline folder to write; new or empty."""
    class_names: Path | None = None
    """Text file with one class name per line, in the order of the class ids."""
    num_heads: int | None = None
    """Heads of the prior; None takes heads that are 64 wide, as published."""


def run_var(arguments: Sequence[str]) -> None:
    """Convert and write."""
    command = parse(ConvertVar, arguments, prog="isthmus convert var")
    _check_out(command.out)
    # imported here: --help does without
    from isthmus.next_scale.conversion import convert_var

    converted = convert_var(
        command.tokenizer,
        command.prior,
        scale_attention=command.scale_attention,
        class_names=_read_names(command.class_names),
    )
    _report_dropped("tokenizer", converted.dropped_tokenizer_keys)
    _report_dropped("prior", converted.dropped_prior_keys)
    converted.pipeline.save_pretrained(command.out)
    _report_written(command.out)


def run_dar(arguments: Sequence[str]) -> None:
    """Convert and write."""
    command = parse(ConvertDar, arguments, prog="isthmus convert dar")
    _check_out(command.out)
    # imported here: --help does without
    from isthmus.dar.conversion import convert_dar

    names = {field.name for field in (*fields(_Tokens), *fields(_Flow))}
    settings = {name: value for name, value in given(command).items() if name in names}
    converted = convert_dar(
        command.tokenizer,
        command.prior,
        num_heads=command.num_heads,
        class_names=_read_names(command.class_names),
        **settings,
    )
    _report_dropped("tokenizer", converted.dropped_tokenizer_keys)
    _report_dropped("prior", converted.dropped_prior_keys)
    converted.pipeline.save_pretrained(command.out)
    _report_written(command.out)


def _check_out(out: Path) -> None:
    check_writable(out)
    if contents(out):
        raise UserError(f"--out must be new or empty, got {out}. Choose another folder or remove it.")


def _report_written(out: Path) -> None:
    logger.info("pipeline written to %s; draw with `isthmus sample %s --out samples`", out, out)


def _read_names(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise UserError(f"--class-names must be a text file, got {path}, which is no file. Check the path.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names must be a text file in UTF-8, got {path} ({error}). Save it so.") from error
    return [line.strip() for line in lines if line.strip()]


def _report_dropped(what: str, dropped: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, reason in dropped.items():
        by_reason[reason].append(key)
    for reason, keys in by_reason.items():
        logger.info("%s: left out %s (%s)", what, ", ".join(sorted(keys)), reason)


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
    from isthmus.dar.export import export_llama

    export_llama(command.model, command.out)
    logger.info("Llama written to %s; its README says how to load and serve it", command.out)
