"""Command lines from dataclasses (tyro), and the options that several commands share.

What cannot be parsed is one line with the nearest option.
"""

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_type_hints

import tyro

from isthmus.dar.options import DAROptions, Solver
from isthmus.errors import UserError, nearest
from isthmus.next_scale.options import NextScaleOptions
from isthmus.pipelines.options import FOLDER_DEFAULT, options_of, parse_guidance

Command = TypeVar("Command")

# tyro frames its messages, in ASCII where the terminal has no better
_FRAME = re.compile(r"[\u2500-\u257f]+|\x1b\[[0-9;]*m|^[|+]|[|+]$|-{3,}")
# how tyro and Python say that a value does not fit, and how we say it
_PLAIN = (
    (r"^Error parsing (\S+): invalid literal for int\(\) .*: ('.*')", r"\1 needs a whole number, got \2"),
    (r"^Error parsing (\S+): could not convert string to float: ('.*')", r"\1 needs a number, got \2"),
    (r"^Error parsing (\S+): no type matching (\S+) could be instantiated from \[(.*?)\]\..*", r"\1 takes \2, got \3"),
    (r"^invalid choice ('.*') for argument '(\S+)'\. Expected one of \((.*)\)\.?$", r"\2 takes one of \3, got \1"),
    # names were looked at before: this is a switch that stands so already
    (r"^Unrecognized options: (--\S+?)\.?$", r"\1 is the default here, so there is no such switch. Leave it out"),
    (r"^Missing value for argument '(\S+)'\. Expected 1 values", r"\1 needs a value"),
)


# options of earlier versions, with a value where only that is gone -> what took their place
_REMOVED = {
    "--refine critic": "Take --refine masked: the model's own probability chooses as well as a critic did.",
    "--report-images": "Measure with the commands that isthmus distill prints at its end: --num of isthmus evaluate is "
    "the number of images.",
}


def parse(
    kind: type[Command], arguments: Sequence[str], *, prog: str, default: Command | None = None, description: str = ""
) -> Command:
    r"""A command's dataclass from its arguments; `--help` prints and exits with code 0.

    Values of one option may be separated by spaces or by commas; `\,` is a comma inside a value, and so is one before a
    space in the name of a class. Raises UserError for an option that is unknown (names the nearest), missing, or has a
    value that does not fit.
    """
    arguments = _split_commas(list(arguments), kind)
    heard = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(heard):
            return tyro.cli(
                kind,
                prog=prog,
                args=arguments,
                description=description or None,
                config=(tyro.conf.FlagCreatePairsOff,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    for option, instead in _REMOVED.items():
        if f" {option} " in f" {' '.join(arguments)} ".replace("=", " ").replace("_", "-"):
            raise UserError(f"there is no {option} any more. {instead}")
    unknown = _first_unknown(kind, arguments)
    if unknown:
        raise UserError(unknown + f" `{prog} --help` lists all.")
    raise UserError(_plain(heard.getvalue(), prog))


def _first_unknown(kind: type, arguments: Sequence[str]) -> str:
    names = [*_options(kind), "--help"]
    # a switch that is on by default is turned off by its name with "no-"
    known = names + [re.sub(r"(--|\.)([^.]+)$", r"\1no-\2", name) for name in names]
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            return f"there is no option {argument.split('=')[0]}.{nearest(name, names)}"
    return ""


def _plain(framed: str, prog: str) -> str:
    """The sentence inside a framed message, without title and pointer to the help."""
    lines = [_FRAME.sub("", line).rstrip() for line in framed.splitlines()]
    body = [line for line in lines[1:] if line.strip()]
    ends = ("For full helptext", "Argument helptext", "Perhaps you meant")
    end = next((i for i, line in enumerate(body) if line.strip().startswith(ends)), len(body))
    text = " ".join(line.strip() for line in body[:end])
    if text.startswith("Missing from"):
        # names stand further left than their help
        indents = {line: len(line) - len(line.lstrip()) for line in body[1:end]}
        names = [line.strip() for line, indent in indents.items() if indent == min(indents.values())]
        return f"missing {', '.join(names)}. `{prog} --help` explains the options."
    if re.match(r"Error parsing [A-Z]\w*: ", text):
        return text.split(": ", 1)[1]  # our own checks say all there is to say
    for pattern, plain in _PLAIN:
        text = re.sub(pattern, plain, text)
    return f"{text.removesuffix('.')}. `{prog} --help` explains the options."


def _split_commas(arguments: list[str], kind: type) -> list[str]:
    """`--classes face,flag` as `--classes face flag`, for options that hold several values."""
    # an option that is given once per value takes it as it is: prompts have commas
    several = {name for name, hint in _options(kind).items() if "tuple[" in hint and "Append" not in hint}

    def values(name: str, text: str) -> list[str]:
        # names of classes have commas: "tench, Tinca tinca"
        parts = re.split(r"(?<!\\),(?!\s)" if name == "--classes" else r"(?<!\\),", text)
        return [part.replace("\\,", ",") for part in parts if part]

    result: list[str] = []
    current = ""
    for argument in arguments:
        is_name = argument.startswith("--")
        name, equals, value = argument.partition("=") if is_name else ("", "", argument)
        current = name.replace("_", "-") if is_name else current
        if current not in several or (is_name and not equals):
            result.append(argument)
        else:
            result += [name] * is_name + values(current, value)
    return result


def _options(kind: type, prefix: str = "--") -> dict[str, str]:
    """Every option of a dataclass (nested ones with dots) and how its type is written."""
    hints = get_type_hints(kind, include_extras=True)
    found: dict[str, str] = {}
    for field in fields(cast(Any, kind)):
        name, hint = prefix + field.name.replace("_", "-"), hints[field.name]
        if is_dataclass(hint):
            found |= _options(cast(type, hint), name + ".")
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()):
            found[name] = str(hint)
    return found


# what the help says of an option that is one of a call's: that option's own text
_CALL = options_of(NextScaleOptions) | options_of(DAROptions)


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Options that stand for the model's own where they are not given."""

    seed: int = 0
    """Image i is drawn from (seed, i)."""
    guidance: str = "default"
    """A number (1 = off), linear:START:END, cosine:START:END, or one number per step; default: the model's."""
    top_k: Annotated[Literal["default", "off"] | int, _CALL["top_k"]] = "default"
    top_p: Annotated[Literal["default", "off"] | float, _CALL["top_p"]] = "default"
    temperature: Annotated[Literal["default"] | float | tuple[float, ...], _CALL["temperature"]] = "default"
    smooth: Annotated[bool, _CALL["smooth"]] = False
    batch_size: int | None = None
    """Images at once; None estimates what fits into memory."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the weights; auto: bfloat16 where this device computes at least twice as fast in it. In bfloat16 images
    may differ between batch sizes, and images that are read have other tokens."""

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, got {self.seed}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}.")

    def draw(self) -> dict[str, Any]:
        """Arguments of a draw; options that were not given stand for the model's own."""
        guidance = FOLDER_DEFAULT if self.guidance == "default" else parse_guidance(self.guidance)
        given = {"top_k": self.top_k, "top_p": self.top_p, "temperature": self.temperature}
        words = {"default": FOLDER_DEFAULT, "off": None}
        filters = {name: words[value] if isinstance(value, str) else value for name, value in given.items()}
        options = {"guidance_scale": guidance, **filters, "smooth": self.smooth or FOLDER_DEFAULT}
        rest = {name: getattr(self, name) for name in ("seed", "batch_size", "device", "dtype")}
        return {"options": options, **rest}


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What images show, for models that read text."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What an image shows, in words (models that read text); once per prompt, taken in turn."""
    prompts: Path | None = None
    """A text file of more prompts, one a line; empty lines are left out."""
    negative_prompt: Annotated[str | None, _CALL["negative_prompt"]] = None
    image_size_condition: tuple[int, int] | None = None
    """Original height and width in pixels that images are drawn as if they had (models with a size condition, such as
    Switti's); none given: 512 x 512."""

    def asked(self) -> dict[str, Any]:
        """Arguments of a call beside the prompts, where they were given."""
        given = {name: getattr(self, name) for name in ("negative_prompt", "image_size_condition")}
        return {name: value for name, value in given.items() if value is not None}

    def words(self) -> tuple[str, ...]:
        """All prompts; UserError where the file cannot be read or has none."""
        if self.prompts is None:
            return self.prompt
        try:
            lines = self.prompts.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"--prompts must be a text file (UTF-8), got {self.prompts}, which cannot be read ({reason}). Name or "
                "write another."
            ) from error
        found = tuple(line.strip() for line in lines if line.strip())
        if not found:
            raise UserError(f"--prompts needs a file with a prompt in a line, got {self.prompts}, which has none.")
        return self.prompt + found


@dataclass(frozen=True, kw_only=True)
class SteeredDrawOptions(DrawOptions):
    """And those that only some models have."""

    steps: Annotated[int | None, _CALL["num_inference_steps"]] = None
    solver: Annotated[Literal["default"] | Solver, _CALL["solver"]] = "default"

    def steering(self) -> dict[str, Any]:
        """Arguments that only some models have, where they were given."""
        given = {"num_inference_steps": self.steps, "solver": None if self.solver == "default" else self.solver}
        return {name: value for name, value in given.items() if value is not None}
