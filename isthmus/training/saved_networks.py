"""What both families do with networks that a run leaves behind, or starts from."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from isthmus.data.source import ImageSource, ImageStream
from isthmus.errors import UserError
from isthmus.nn.saved_model import SavedModel, without_values
from isthmus.pipelines.base import SavedPipeline
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions
from isthmus.training.checkpoints import gathered, written_or_explained
from isthmus.training.config import PriorSampling, Run
from isthmus.training.optim import ExponentialMovingAverage

logger = logging.getLogger("isthmus")
AnyModel = TypeVar("AnyModel", bound=SavedModel)
AnyPipeline = TypeVar("AnyPipeline", bound=SavedPipeline)

TOKENIZER_FOLDER = "image_tokenizer"


def averaged_model(model: AnyModel, ema: ExponentialMovingAverage, *, prefix: str = "") -> AnyModel:
    """A whole copy of `model` that holds the averages (and its own frozen weights), in eval mode.

    `prefix` begins its parameters' names in the network that is averaged. Every process calls where weights are shared
    out.
    """
    state = gathered(dict(model.state_dict())) | gathered(ema.averages_under(prefix))
    with without_values():
        copy = type(model)(**model.config)
    copy.load_state_dict({name: value.to(model.device, copy=True) for name, value in state.items()}, assign=True)
    return copy.eval().requires_grad_(False)


def load_model(path: str, kind: type[AnyPipeline]) -> AnyPipeline:
    """A saved model to go on from; UserError where it is of another family than this kind of pipeline."""
    pipeline = load_pipeline(path, device="cpu")
    if not isinstance(pipeline, kind):
        raise UserError(
            f"this run starts from a {kind.__name__}, got {path}, which is a {type(pipeline).__name__}. Choose a "
            "preset of its family (`isthmus info presets`)."
        )
    return pipeline


def kept_classes(class_names: Sequence[str], saved_names: Sequence[str]) -> dict[int, int]:
    """Label -> label in a saved model, for classes that both know by name. Numbers are no names: they mean anything.

    >>> kept_classes(("flag", "tree", "0"), ("face", "flag", "0"))
    {0: 1}
    """
    known = {name: label for label, name in enumerate(saved_names)}
    return {i: known[name] for i, name in enumerate(class_names) if name in known and not name.isdigit()}


def refuse_contradictions(
    saved: Mapping[str, Any], wanted: Mapping[str, object], name: str, *, options: str = "model"
) -> None:
    """A model that is trained on keeps its network: UserError where an argument in `wanted` is not the saved one.

    `options` is the run's field that holds what is wanted.
    """
    for option, value in wanted.items():
        present = saved[option]
        if value != (tuple(present) if isinstance(present, (list, tuple)) else present):
            raise UserError(
                f"{options}.{option} is {present} in {name}, got {value}. Leave it out: a model that is fine-tuned "
                "keeps its network."
            )


def sampling_options(
    settings: PriorSampling, *, codebook_size: int, num_classes: int, num_guided_steps: int
) -> SamplingOptions:
    """A run's settings of draws for its model; without classes there is nothing to guide.

    Raises UserError where the model cannot draw with them: at the start, since the first preview may come after days.
    """
    options = settings.options()
    if not num_classes:
        options = replace(options, guidance_scale=1.0)
    options.check(codebook_size=codebook_size, num_steps=num_guided_steps)
    return options


def export_tokenizer(
    accelerator: Accelerator, run: Run, source: ImageSource | ImageStream, parts: Mapping[str, Any]
) -> Path:
    """Write what makes up a tokenizer, networks and scheduler by the names of their folders; returns the run's folder.

    `TOKENIZER_FOLDER` is the last of `parts`: with it all are there. Raises UserError where the disk is full.
    """
    if accelerator.is_main_process:
        partial = run.out / "export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # no pipeline yet, whose index would say this
        record = {"data": source.name, "attribution": source.attribution, "class_names": list(source.class_names)}
        with written_or_explained(run.out / TOKENIZER_FOLDER, partial):
            for name, part in parts.items():
                part.save_pretrained(partial / name)
            text = json.dumps(record, indent=2) + "\n"
            (partial / TOKENIZER_FOLDER / "training.json").write_text(text, encoding="utf-8")
        for name in parts:
            shutil.rmtree(run.out / name, ignore_errors=True)
            (partial / name).rename(run.out / name)
        partial.rmdir()
        logger.info("tokenizer written to %s", run.out)
    accelerator.wait_for_everyone()
    return run.out


def export_pipeline(
    accelerator: Accelerator,
    run: Run,
    source: ImageSource | ImageStream,
    options: SamplingOptions,
    kind: Callable[..., SavedPipeline],
    *,
    class_names: Sequence[str] | None = None,
    prompt: str = "",
    note: str = "",
    **networks: object,
) -> Path:
    """Write a pipeline of `networks` into the run's folder: a trained run loads like a downloaded model.

    `options` become the defaults of a call, `class_names` None are those of the images, `prompt` is an example for the
    card of a model of texts, `note` what it says of the training beside its steps. Raises UserError where
    the disk is full.
    """
    if accelerator.is_main_process:
        pipeline = kind(
            **networks,
            class_names=source.class_names if class_names is None else class_names,
            sampling_defaults=options,
            data={"name": source.name, "attribution": source.attribution} | ({"prompt": prompt} if prompt else {}),
            protocol=f"{run.num_steps} steps of {run.batch_size} images, seed {run.seed}, averaged weights (decay "
            f"{run.ema_decay}); {note and f'{note}; '}settings and data fingerprint are in run.json, measurements in "
            "log.jsonl",
        )
        with written_or_explained(run.out):
            pipeline.save_pretrained(run.out)
        logger.info("pipeline written to %s", run.out)
    accelerator.wait_for_everyone()
    return run.out
