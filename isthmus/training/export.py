"""What a finished run leaves behind: the averaged model in a folder that loads like any other."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.errors import UserError
from isthmus.generation.options import SamplingOptions, parse_guidance
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pipelines.components import load_component
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.training.checkpoints import gathered, written_or_explained
from isthmus.training.config import PriorRun, TokenizerRun
from isthmus.training.ema import ExponentialMovingAverage

logger = logging.getLogger("isthmus")
AnyModel = TypeVar("AnyModel", bound=ModelMixin)

TOKENIZER_FOLDER = "image_tokenizer"


def averaged_model(model: AnyModel, ema: ExponentialMovingAverage, *, prefix: str = "") -> AnyModel:
    """A whole copy of `model` that holds the averages (and its own frozen weights), in eval mode.

    `prefix` begins the names of its parameters where the averages are those of a larger module. Every process must
    call it where weights are sharded.
    """
    state = gathered(dict(model.state_dict())) | gathered(ema.averages_under(prefix))
    with torch.device("meta"):
        copy = type(model)(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    copy.load_state_dict({name: value.to(model.device, copy=True) for name, value in state.items()}, assign=True)
    return copy.eval().requires_grad_(False)


def load_tokenizer(path: str) -> MultiScaleVQVAE:
    """The tokenizer in a run folder, a pipeline folder, a tokenizer folder, or a model on the hub.

    Raises:
        UserError: there is none, or it does not load strictly.
    """
    folder = Path(path)
    if not folder.exists():
        # a hub id brings a whole pipeline
        return _next_scale(path).image_tokenizer
    if (folder / TOKENIZER_FOLDER).is_dir():
        folder = folder / TOKENIZER_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(
            f"a tokenizer is the folder of a finished `isthmus train tokenizer` (or of a pipeline), got {path}, which "
            f"holds no {TOKENIZER_FOLDER}. Finish the run first: the same command continues it."
        )
    return load_component(MultiScaleVQVAE, folder)


def refuse_contradictions(
    model: ModelMixin, wanted: Mapping[str, object], name: str, *, options: str = "model"
) -> None:
    """A model that is trained on keeps its network; `options` is the run's field that holds what is wanted.

    Raises:
        UserError: an argument in `wanted` differs from the saved model's.
    """
    for option, value in wanted.items():
        present = model.config[option]
        if value != (tuple(present) if isinstance(present, (list, tuple)) else present):
            raise UserError(
                f"{options}.{option} is {present} in {name}, got {value}. Leave it out: a model that is fine-tuned "
                "keeps its network."
            )


def export_tokenizer(
    accelerator: Accelerator, tokenizer: MultiScaleVQVAE, run: TokenizerRun, source: ImageSource | ImageStream
) -> Path:
    """Write the tokenizer under the run's folder, complete or not at all.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    target = run.out / TOKENIZER_FOLDER
    if accelerator.is_main_process:
        partial = run.out / (TOKENIZER_FOLDER + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with written_or_explained(target, partial):
            tokenizer.to(memory_format=torch.contiguous_format).save_pretrained(partial)  # pyright: ignore[reportCallIssue]
            card = {"data": source.name, "attribution": source.attribution, "class_names": list(source.class_names)}
            (partial / "training.json").write_text(json.dumps(card, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        logger.info("tokenizer written to %s", target)
    accelerator.wait_for_everyone()
    return target


def load_pair(path: str) -> tuple[MultiScaleVQVAE, NextScaleTransformer]:
    """Tokenizer and prior of a saved pipeline, to go on training."""
    pipeline = _next_scale(path)
    return pipeline.image_tokenizer, pipeline.transformer


def _next_scale(path: str) -> NextScalePipeline:
    pipeline = load_pipeline(path, device="cpu")
    if not isinstance(pipeline, NextScalePipeline):
        raise UserError(
            f"a next-scale run starts from a next-scale model, got {path}, which is a {type(pipeline).__name__}. "
            "Choose a preset of its family (`isthmus info presets`)."
        )
    return pipeline


def sampling_options(run: PriorRun, transformer: NextScaleTransformer) -> SamplingOptions:
    """The run's settings of draws; without classes there is nothing to guide."""
    settings = run.sampling
    top_k = None if settings.top_k is None else min(settings.top_k, transformer.config["codebook_size"])
    return SamplingOptions(
        guidance_scale=parse_guidance(settings.guidance) if transformer.null_class_id else 1.0,
        top_k=top_k,
        top_p=settings.top_p,
        temperature=settings.temperature,
    )


def export_pipeline(
    accelerator: Accelerator,
    tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    run: PriorRun,
    source: ImageSource | ImageStream,
) -> Path:
    """Write the pipeline into the run's folder: a trained run loads like a downloaded model.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if accelerator.is_main_process:
        pipeline = NextScalePipeline(
            image_tokenizer=tokenizer,
            transformer=transformer,
            class_names=source.class_names,
            sampling_defaults=sampling_options(run, transformer),
            data={"name": source.name, "attribution": source.attribution},
            protocol=(
                f"{run.num_steps} steps of {run.batch_size} images, seed {run.seed}, averaged weights (decay "
                f"{run.ema_decay}); settings and data fingerprint are in run.json, measurements in log.jsonl"
            ),
        )
        with written_or_explained(run.out):
            pipeline.save_pretrained(run.out)
        logger.info("pipeline written to %s", run.out)
    accelerator.wait_for_everyone()
    return run.out
