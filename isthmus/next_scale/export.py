"""What a finished run leaves behind: the averaged model in a folder that loads like any other."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.errors import UserError
from isthmus.generation.options import SamplingOptions
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.next_scale import NextScalePipeline
from isthmus.training.checkpoints import written_or_explained
from isthmus.training.config import TokenizerRun, TokensRun
from isthmus.training.saved_networks import (
    TOKENIZER_FOLDER,
    data_record,
    protocol,
    tokenizer_record,
)

logger = logging.getLogger("isthmus")


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
    return MultiScaleVQVAE.from_pretrained(folder)


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
            (partial / "training.json").write_text(
                json.dumps(tokenizer_record(source), indent=2) + "\n", encoding="utf-8"
            )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        logger.info("tokenizer written to %s", target)
    accelerator.wait_for_everyone()
    return target


@dataclass(frozen=True)
class Teacher:
    """A saved model that another one starts or learns from.

    Attributes:
        tokenizer: its image tokenizer.
        transformer: its prior.
        class_names: in the order of the labels; empty where classes have no names.
    """

    tokenizer: MultiScaleVQVAE
    transformer: NextScaleTransformer
    class_names: tuple[str, ...]


def load_teacher(path: str) -> Teacher:
    """Tokenizer, prior and class names of a saved pipeline."""
    pipeline = _next_scale(path)
    names = names_in_order(pipeline.class_names)
    return Teacher(pipeline.image_tokenizer, pipeline.transformer, names)


def _next_scale(path: str) -> NextScalePipeline:
    pipeline = load_pipeline(path, device="cpu")
    if not isinstance(pipeline, NextScalePipeline):
        raise UserError(
            f"a next-scale run starts from a next-scale model, got {path}, which is a {type(pipeline).__name__}. "
            "Choose a preset of its family (`isthmus info presets`)."
        )
    return pipeline


def export_pipeline(
    accelerator: Accelerator,
    tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    run: TokensRun,
    source: ImageSource | ImageStream,
    options: SamplingOptions,
) -> Path:
    """Write the pipeline into the run's folder: a trained run loads like a downloaded model.

    `options` become the defaults of a call.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if accelerator.is_main_process:
        pipeline = NextScalePipeline(
            image_tokenizer=tokenizer,
            transformer=transformer,
            class_names=source.class_names,
            sampling_defaults=options,
            data=data_record(source),
            protocol=protocol(run),
        )
        with written_or_explained(run.out):
            pipeline.save_pretrained(run.out)
        logger.info("pipeline written to %s", run.out)
    accelerator.wait_for_everyone()
    return run.out
