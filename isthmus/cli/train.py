"""`isthmus train tokenizer` and `isthmus train prior`: a preset, then what the command line says."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from isthmus.cli.parsing import parse
from isthmus.errors import UserError
from isthmus.presets import default_prior_preset, default_tokenizer_preset, prior_preset, tokenizer_preset
from isthmus.training.config import PriorRun, Run, TokenizerRun, run_from_json, run_to_json

logger = logging.getLogger("isthmus")
AnyRun = TypeVar("AnyRun", bound=Run)

# short forms of options that are asked for often
_SHORT = {"--from": "--from-model", "--scale-attention": "--model.scale-attention"}
_DESCRIPTION = """{about}

Start with --preset NAME (`isthmus info presets`), --from MODEL to fine-tune a saved model, or --config RUN.JSON to
repeat a run; every option below overrides it. --dry-run prints the resolved run, its size and its cost, and stops.
The same command again continues a run that was stopped."""


def run_tokenizer(arguments: Sequence[str]) -> None:
    """Train a tokenizer, or print what would be trained."""
    words, config, dry = _own_options(arguments)
    name = _value(words, "--preset") or _tokenizer_preset_for(words)
    base = _from_config(TokenizerRun, config, words) if config else tokenizer_preset(name)
    about = "Train the image tokenizer: images to tokens on a pyramid of scales, and back."
    run = _parsed(TokenizerRun, words, base, "isthmus train tokenizer", about)
    if dry:
        from isthmus.cli.dry_run import describe_tokenizer_run

        print(describe_tokenizer_run(run))
        return
    # imported here: --help does without
    from isthmus.training.train_tokenizer import train_tokenizer

    _train(run, train_tokenizer)


def run_prior(arguments: Sequence[str]) -> None:
    """Train a prior, or print what would be trained."""
    words, config, dry = _own_options(arguments)
    name = _value(words, "--preset") or default_prior_preset(
        from_model=bool(_value(words, "--from-model")), scale_attention=_value(words, "--model.scale-attention") or None
    )
    base = _from_config(PriorRun, config, words) if config else prior_preset(name)
    about = "Train the transformer that predicts a scale from the coarser ones: VAR (causal) or SRDD (markov)."
    run = _parsed(PriorRun, words, base, "isthmus train prior", about)
    if dry:
        from isthmus.cli.dry_run import describe_prior_run

        print(describe_prior_run(run))
        return
    # imported here: --help does without
    from isthmus.training.train_prior import train_prior

    _train(run, train_prior)


def _train(run: AnyRun, train: Callable[[AnyRun], Path]) -> None:
    try:
        logger.info("done: %s", train(run))
    except RuntimeError as error:
        # imported here: it is loaded by now
        from isthmus.pipelines.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        if run.accumulate * 2 <= run.batch_size:
            advice = f"Try --accumulate {run.accumulate * 2}: the same batch in smaller parts."
        else:
            advice = f"Try --batch-size {max(run.batch_size // 2, 1)}."
        raise UserError(f"memory ran out at batch size {run.batch_size}. {advice}") from error


def _own_options(arguments: Sequence[str]) -> tuple[list[str], str, bool]:
    """The arguments without --config and --dry-run, and with short forms spelt out; the config file; dry or not."""
    words, config, dry = [], "", False
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--dry-run":
            dry = True
        elif name == "--config":
            config = value if equals else next(rest, "")
            if not config:
                raise UserError("--config needs the run.json of a run. Pass its path.")
        else:
            words.append(_SHORT.get(name, name) + equals + value)
    return words, config, dry


def _value(words: Sequence[str], option: str) -> str:
    """What follows an option, read before the defaults are known; "" where it is not given."""
    for word, after in zip(words, [*words, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else after
    return ""


def _tokenizer_preset_for(words: Sequence[str]) -> str:
    size = _value(words, "--image-size")
    # a size that is no number is refused, in words, when the options are parsed
    image_size = int(size) if size.isdigit() and not _value(words, "--model.scale-sizes") else None
    return default_tokenizer_preset(image_size=image_size, from_model=bool(_value(words, "--from-model")))


def _from_config(kind: type[AnyRun], path: str, words: Sequence[str]) -> AnyRun:
    if _value(words, "--preset"):
        raise UserError("a run starts from --preset or from --config, got both. Pass one of them.")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--config must be the run.json of a run, got {path}, which is no file.")
    try:
        record = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config must be JSON, {path} cannot be read ({error}).") from error
    if not isinstance(record, dict) or record.get("kind", kind.__name__) != kind.__name__:
        raise UserError(f"{path} is not the record of a {kind.__name__}. Use the other `isthmus train` command.")
    return run_from_json(kind, record.get("run", record))


def _parsed(kind: type[AnyRun], words: list[str], base: AnyRun, prog: str, about: str) -> AnyRun:
    run = parse(kind, words, prog=prog, default=base, description=_DESCRIPTION.format(about=about))
    logger.debug("%s", json.dumps(run_to_json(run), indent=2))
    return run
