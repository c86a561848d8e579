"""`isthmus train` and `isthmus distill`: a preset, then what the command line says."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from isthmus.cli.options import parse
from isthmus.dar.runs import (
    DIFFUSION_TOKENIZER_PRESETS,
    NEXT_TOKEN_PRIOR_PRESETS,
    DiffusionTokenizerRun,
    NextTokenPriorRun,
)
from isthmus.errors import UserError
from isthmus.next_scale.runs import (
    DISTILL_PRESETS,
    PRIOR_PRESETS,
    TOKENIZER_PRESETS,
    DistillRun,
    PriorRun,
    TokenizerRun,
    default_tokenizer_preset,
)
from isthmus.nn.component_files import read_config, read_json
from isthmus.pipelines.folder import model_folder, read_index
from isthmus.pipelines.options import SamplingOptions
from isthmus.registry import DEFAULT_PRESETS, imported, task_of
from isthmus.training.config import (
    Preset,
    PriorSampling,
    Run,
    explaining_places,
    preset_run,
    read_run_record,
    run_from_json,
    run_to_json,
)

logger = logging.getLogger("isthmus")

# short forms of options that are asked for often
_SHORT = {"--from": "--from-model", "--scale-attention": "--model.scale-attention", "--text": "--text.encoder"}
_DESCRIPTION = """{about}

Start with --preset NAME (`isthmus info presets`), --from MODEL to fine-tune a saved model, or --config RUN.JSON to
repeat a run; every option below overrides it. --dry-run prints the resolved run, its size and its cost, and stops.
The same command again continues a run that was stopped."""

# what a run is, in its --help
_ABOUT: dict[type[Run], str] = {
    TokenizerRun: "Train the image tokenizer: images to tokens on a pyramid of scales, and back. --preset dar-small-32 "
    "(or another dar- preset) trains the D-AR tokenizer and its pixel decoder instead, with options of its own.",
    DiffusionTokenizerRun: "Train the D-AR tokenizer and its decoder: images to groups of tokens that drive a "
    "diffusion of pixels.",
    PriorRun: "Train the transformer that predicts a scale from the coarser ones: VAR (causal) or SRDD (markov). With "
    "the tokenizer or a model of the D-AR family, train its Llama instead, with options of its own.",
    DistillRun: "Train a student on fewer scales (--scale-sizes), or under another mask (--scale-attention), from a "
    "saved next-scale model: isthmus distill MODEL --scale-sizes 1,3,5,8,13,16 --out DIR. Images, classes, captions "
    "and sampling defaults are the teacher's where they are not given.",
    NextTokenPriorRun: "Train the Llama that predicts the tokens of a D-AR tokenizer one by one.",
}


def _train(
    what: str, presets: Mapping[str, Preset[Any]], default: Callable[[Sequence[str]], str], arguments: Sequence[str]
) -> None:
    words, config, dry = own_options(arguments)
    base = base_run(words, config, presets, what, default)
    run_training(base, words, f"isthmus train {what}", f"isthmus.training.train_{what}:train_{what}", dry, config)


def base_run(
    words: Sequence[str],
    config: str,
    presets: Mapping[str, Preset[Any]],
    what: str,
    default: Callable[[Sequence[str]], str],
) -> Run:
    """The run that the options change: of a record, of the preset that is named, or of the default one."""
    preset = option_value(words, "--preset")
    if not config:
        return preset_run(presets, what, preset or default(words))
    if preset:
        raise UserError("a run starts from --preset or from --config, got both. Pass one of them.")
    if not Path(config).is_file():
        raise UserError(f"--config must be the run.json of a run, got {config}, which is no file.")
    kinds = {type(preset.run).__name__: type(preset.run) for preset in presets.values()}
    record = read_json(Path(config))
    name = record.get("kind", next(iter(kinds)))
    if name not in kinds:
        raise UserError(f"{config} is not the record of a {' or a '.join(kinds)}. Use the command that wrote it.")
    return run_from_json(kinds[name], record.get("run", record))


def run_training(base: Run, words: list[str], prog: str, train: str, dry: bool, record: str) -> None:
    """Train what the base run, read from `record` if any, and the options on top say, or print it where `dry`."""
    about = _DESCRIPTION.format(about=_ABOUT[type(base)])
    run = parse(type(base), words, prog=prog, default=base, description=about)
    logger.debug("%s", json.dumps(run_to_json(run), indent=2))
    from isthmus.pipelines.memory import naming_next_batch_size

    advice = f"Try --batch-size {max(run.batch_size // 2, 1)}."
    if run.accumulate * 2 <= run.batch_size:
        advice = f"Try --accumulate {run.accumulate * 2}: the same batch in smaller parts."
    with explaining_places(Path(record), run_to_json(run)), naming_next_batch_size(run.batch_size, advice=advice):
        if dry:
            print(task_of(run).describe(run))
        else:
            logger.info("done: %s", imported(train)(run))


def own_options(arguments: Sequence[str], short: Mapping[str, str] = _SHORT) -> tuple[list[str], str, bool]:
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
            words.append(short.get(name, name) + equals + value)
    return words, config, dry


def option_value(words: Sequence[str], option: str) -> str:
    """What follows an option, read before the defaults are known; "" where it is not given."""
    for word, after in zip(words, [*words, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == option:
            return value if equals else after
    return ""


def _tokenizer_preset_for(words: Sequence[str]) -> str:
    if model := option_value(words, "--from-model"):
        return _presets_of(model)["tokenizer"]
    size = option_value(words, "--image-size")
    # a size that is no number is refused, in words, when the options are parsed
    ours = size.isdigit() and not option_value(words, "--model.scale-sizes")
    return default_tokenizer_preset(int(size) if ours else None)


def _prior_preset_for(words: Sequence[str]) -> str:
    if model := option_value(words, "--from-model"):
        return _presets_of(model)["prior"]
    presets = _presets_of(option_value(words, "--tokenizer"))
    mask = option_value(words, "--model.scale-attention")
    return presets.get(f"new {mask} prior", presets["new prior"])


def _presets_of(model: str) -> Mapping[str, str]:
    """Those of the family of a saved model or tokenizer, of the next-scale family where none is named."""
    name = None
    if model:
        folder = model_folder(model)
        inner = folder / "image_tokenizer"
        folder = inner if inner.is_dir() else folder
        name = read_config(folder).get("_class_name") if (folder / "config.json").is_file() else None
    return DEFAULT_PRESETS.get(str(name), DEFAULT_PRESETS["MultiScaleVQVAE"])


run_tokenizer = partial(
    _train, "tokenizer", {**TOKENIZER_PRESETS, **DIFFUSION_TOKENIZER_PRESETS}, _tokenizer_preset_for
)
run_prior = partial(_train, "prior", {**PRIOR_PRESETS, **NEXT_TOKEN_PRIOR_PRESETS}, _prior_preset_for)


# settings of the images that a student takes over from its teacher's run.json
_DATA_FIELDS = (
    *("data", "stream", "max_images", "classes", "augment"),
    *("image_column", "label_column", "caption_column"),
)


def run_distill(arguments: Sequence[str]) -> None:
    """Distil a model, or print what would be trained."""
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--from-model", *arguments]
    words, config, dry = own_options(arguments, {"--from": "--from-model"})
    base = base_run(words, config, DISTILL_PRESETS, "distillation", lambda _: "distill-small")
    assert isinstance(base, DistillRun), "the only kind that is asked for"
    teacher = option_value(words, "--from-model")
    if teacher and not config:
        base = taught_by(base, teacher, own_data=bool(option_value(words, "--data")))
    record = config or (str(model_folder(teacher) / "run.json") if teacher else "")
    run_training(base, words, "isthmus distill", "isthmus.next_scale.distillation:distill", dry, record)


def taught_by(run: DistillRun, model: str, *, own_data: bool) -> DistillRun:
    """The run with the images, classes and sampling defaults of a saved model; options override them.

    UserError where it has no scales, or does not say what it was trained on and there are no `own_data` either.
    """
    folder = model_folder(model)
    index = read_index(folder)
    if index.get("_class_name") != "NextScalePipeline":
        raise UserError(
            f"only next-scale models (VAR, SRDD) have scales to leave out, {model} is a {index.get('_class_name')}."
        )
    run = replace(run, sampling=PriorSampling.of(SamplingOptions.from_dict(index["sampling_defaults"])))
    if record := read_run_record(folder / "run.json").get("run"):
        known = {name: record[name] for name in _DATA_FIELDS if name in record}
        theirs = run_from_json(DistillRun, known)
        return replace(run, **{name: getattr(theirs, name) for name in known})
    if not own_data:
        raise UserError(
            f"{model} does not say which images it was trained on (no run.json). Pass --data, and --classes for some."
        )
    return run
