"""`isthmus distill MODEL`: what the teacher was trained on, a preset, then what the command line says."""

from collections.abc import Sequence
from dataclasses import replace

from isthmus.cli.train import base_run, option_value, own_options, run_training
from isthmus.errors import UserError
from isthmus.generation.options import SamplingOptions, guidance_text
from isthmus.pipelines.folder import read_index
from isthmus.pipelines.hub import model_folder
from isthmus.presets import DISTILL_PRESETS
from isthmus.training.config import AugmentConfig, PriorSampling
from isthmus.training.distill_config import DistillRun
from isthmus.training.recorded_settings import recorded_settings

# settings of the images that a student takes over from its teacher's run.json
_DATA_FIELDS = ("data", "stream", "max_images")


def run(arguments: Sequence[str]) -> None:
    """Distil a model, or print what would be trained."""
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--from-model", *arguments]
    words, config, dry = own_options(arguments, {"--from": "--from-model"})
    base = base_run(words, config, (DistillRun,), DISTILL_PRESETS, "distillation", "distill-small")
    assert isinstance(base, DistillRun), "the only kind that is asked for"
    teacher = option_value(words, "--from-model")
    if teacher and not config:
        base = taught_by(base, teacher, own_data=bool(option_value(words, "--data")))
    record = config or (str(model_folder(teacher) / "run.json") if teacher else "")
    run_training(base, words, "isthmus distill", dry, record=record)


def taught_by(run: DistillRun, model: str, *, own_data: bool) -> DistillRun:
    """The run with the images, classes and sampling defaults of a saved model; options override them.

    Raises:
        UserError: there is no such model, it has no scales, or it does not say what it was trained on and `own_data`
            says that the command line does not either.
    """
    folder = model_folder(model)
    index = read_index(folder)
    if index.get("_class_name") != "NextScalePipeline":
        raise UserError(
            f"only next-scale models (VAR, SRDD) have scales to leave out, {model} is a {index.get('_class_name')}."
        )
    run = replace(run, sampling=_sampling(SamplingOptions.from_dict(index["sampling_defaults"])))
    record = recorded_settings(folder)
    if record:
        given = {name: record[name] for name in _DATA_FIELDS if name in record}
        classes = record.get("classes")
        augment = AugmentConfig(**record["augment"]) if "augment" in record else run.augment
        return replace(run, **given, classes=None if classes is None else tuple(classes), augment=augment)
    if not own_data:
        raise UserError(
            f"{model} does not say which images it was trained on (no run.json). Pass --data, and --classes for some."
        )
    return run


def _sampling(options: SamplingOptions) -> PriorSampling:
    return PriorSampling(
        guidance=guidance_text(options.guidance_scale),
        top_k=options.top_k,
        top_p=options.top_p,
        temperature=options.temperature,
        smooth=options.smooth,
    )
