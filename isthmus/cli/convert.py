"""`isthmus convert` (published weights to a pipeline folder) and `isthmus export` (the Llama of a D-AR model)."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import tyro

from isthmus.cli.options import parse
from isthmus.errors import UserError
from isthmus.files import check_writable, contents
from isthmus.training.arguments import arguments_of, given

logger = logging.getLogger("isthmus")


@dataclass(frozen=True, kw_only=True)
class _Convert:
    out: Path
    """The pipeline folder to write; new or empty."""

    def check_out(self) -> None:
        """Raise UserError where --out cannot be written or holds something: before the work and not after it."""
        check_writable(self.out)
        if contents(self.out):
            raise UserError(f"--out must be new or empty, got {self.out}. Choose another folder or remove it.")


@dataclass(frozen=True, kw_only=True)
class _ConvertClasses(_Convert):
    class_names: Path | None = None
    """Text file with one class name per line, in the order of the class ids."""

    def names(self) -> list[str]:
        """What --class-names holds."""
        if self.class_names is None:
            return []
        try:
            lines = self.class_names.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--class-names must be a text file in UTF-8, got {self.class_names} ({error}). Check the path, or "
                "save it as UTF-8."
            ) from error
        return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True, kw_only=True)
class ConvertVar(_ConvertClasses):
    """Published VAR weights (.pth, .safetensors or shards; bare, nested or EMA) to a folder.

    Sizes are read off the files. Every key that is not needed is listed with its reason; a key that is unknown or
    missing is an error.
    """

    tokenizer: Path
    """The VQVAE file, such as vae_ch160v4096z32.pth."""
    prior: Path
    """The transformer file, such as var_d16.pth."""
    scale_attention: Literal["causal", "markov"] = "causal"
    """markov imports the weights as the start of SRDD fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class ConvertSwitti(_Convert):
    """Published Switti weights (.safetensors, .pt or shards; bare, nested or EMA) and text encoders to a folder.

    Sizes, and whether a scale sees earlier ones, are read off the files. Every key that is not needed is listed with
    its reason; a key that is unknown or missing is an error.
    """

    tokenizer: Path
    """The VQVAE file, that of VQVAE-Switti or of VAR."""
    prior: Path
    """The transformer file, or the folder that it lies in with its config.json."""
    text_encoder: Path
    """Folder of transformers with CLIP ViT-L/14 and its tokenizer."""
    text_encoder_2: Path | None = None
    """The same of CLIP ViT-bigG/14 (laion2B-39B-b160k); none for a prior that was trained with one encoder."""
    keep_text_encoder: bool = True
    """Write the encoders too; without them the folder takes what they made of a prompt in the place of words."""
    num_heads: int | None = None
    """Heads of the prior; None takes heads that are 64 wide, as published."""
    rope_base: float | None = None
    """Base of the rotary angles; None is rope_theta in the config.json beside the prior, or 10000."""
    rope_extent: float | None = None
    """Coordinate of the last row and column; None is rope_size in the config.json beside the prior, or 128."""
    scale_attention: Literal["causal", "markov"] | None = None
    """None is that of the file's mask; markov imports Switti-AR as the start of SRDD fine-tuning."""


_Tokens = arguments_of(
    "isthmus.dar.tokenizer:DiffusionTokenizer", ["image_size", "num_tokens", "num_groups", "tokens_per_step"]
)
_Flow = arguments_of("isthmus.dar.scheduler:FlowMatchingScheduler", ["num_inference_steps", "time_shift", "data_std"])


@dataclass(frozen=True, kw_only=True)
class ConvertDar(_Tokens, _Flow, _ConvertClasses):
    """Published D-AR weights (.pt, .safetensors or shards; bare, nested or EMA) to a folder.

    Layers and widths are read off the files. What shapes cannot tell comes from the settings in the tokenizer file;
    the options below take their place, and where there are neither, the published model's hold. Every key that is not
    needed is listed with its reason; a key that is unknown or missing is an error.
    """

    tokenizer: Path
    """The tokenizer file, such as D-AR-tokenizer_v1.pt, which also holds the pixel decoder."""
    prior: Path
    """The Llama's file, such as D-AR-L-360K.pt."""
    num_heads: int | None = None
    """Heads of the prior; None takes heads that are 64 wide, as published."""


def run_var(arguments: Sequence[str]) -> None:
    """Convert and write."""
    command = parse(ConvertVar, arguments, prog="isthmus convert var")
    command.check_out()
    from isthmus.next_scale.conversion import convert_var

    _write(command, convert_var, class_names=command.names(), scale_attention=command.scale_attention)


def run_switti(arguments: Sequence[str]) -> None:
    """Convert and write."""
    command = parse(ConvertSwitti, arguments, prog="isthmus convert switti")
    command.check_out()
    from isthmus.next_scale.conversion import convert_switti

    names = ("text_encoder", "text_encoder_2", "num_heads", "rope_base", "rope_extent", "scale_attention")
    settings = {name: getattr(command, name) for name in names}
    _write(command, convert_switti, {} if command.keep_text_encoder else {"text_encoder": False}, **settings)


def run_dar(arguments: Sequence[str]) -> None:
    """Convert and write."""
    command = parse(ConvertDar, arguments, prog="isthmus convert dar")
    command.check_out()
    from isthmus.dar.conversion import convert_dar

    names = ("num_heads", *(field.name for kind in (_Tokens, _Flow) for field in fields(kind)))
    settings = {name: value for name, value in given(command).items() if name in names}
    _write(command, convert_dar, class_names=command.names(), **settings)


def _write(
    command: ConvertVar | ConvertSwitti | ConvertDar,
    convert: Callable[..., Any],
    saving: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> None:
    converted = convert(command.tokenizer, command.prior, **settings)
    for what in ("tokenizer", "prior"):
        by_reason: dict[str, list[str]] = defaultdict(list)
        for key, reason in getattr(converted, f"dropped_{what}_keys").items():
            by_reason[reason].append(key)
        for reason, keys in by_reason.items():
            logger.info("%s: left out %s (%s)", what, ", ".join(sorted(keys)), reason)
    converted.pipeline.save_pretrained(command.out, **saving)
    logger.info("pipeline written to %s; draw with `isthmus sample %s --out samples`", command.out, command.out)


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
    from isthmus.dar.export import export_llama

    export_llama(command.model, command.out)
    logger.info("Llama written to %s; its README says how to load and serve it", command.out)
