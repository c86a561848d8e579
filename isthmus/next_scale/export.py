"""What a next-scale training shows and leaves behind: previews at fixed seeds, and the averaged model as a folder."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from isthmus.data.batches import EvaluationImages
from isthmus.data.huggingface import ImageStream
from isthmus.data.source import ImageSource
from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.refinement import refined_scales
from isthmus.next_scale.runs import TokenizerRun
from isthmus.next_scale.sampling import ScaleSampler
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.pictures import save_picture, spread, table, to_pil
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline
from isthmus.pipelines.options import SamplingOptions
from isthmus.training.checkpoints import written_or_explained
from isthmus.training.config import TokensRun
from isthmus.training.saved_networks import TOKENIZER_FOLDER, data_record, protocol, tokenizer_record

_PREVIEW_SEED = 0


@torch.no_grad()
def save_reconstructions(
    tokenizer: MultiScaleVQVAE, source: ImageSource, folder: Path, step: int, *, num_images: int = 8
) -> Path:
    """Rows = held-out images; columns = scales 0..k added up, the image itself last."""
    views = EvaluationImages(source, tokenizer.image_size)
    chosen = spread(len(views), num_images)
    images = torch.stack([torch.as_tensor(views[i]["image"]) for i in chosen]).to(tokenizer.device)
    token_ids = tokenizer.encode(images).token_ids
    steps = [
        to_pil(tokenizer.decode_features(tokenizer.features_up_to(token_ids, k)))
        for k in range(tokenizer.schedule.num_scales)
    ]
    names = [f"{s} x {s}" for s in tokenizer.schedule.sizes] + ["image"]
    rows = list(zip(*steps, to_pil(images), strict=True))
    return save_picture(table(rows, column_names=names), folder / f"reconstructions-{step:08d}.png")


def save_samples(
    tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    class_names: Sequence[str],
    options: SamplingOptions,
    folder: Path,
    step: int,
    *,
    per_class: int = 8,
    num_classes: int = 10,
) -> Path:
    """Rows = the first classes, columns = fixed seeds: the same picture at every step, but for the training."""
    shown = min(transformer.null_class_id, num_classes)
    classes = list(range(shown)) or [transformer.null_class_id]
    labels = torch.tensor([label for label in classes for _ in range(per_class)], device=transformer.device)
    seeds = [(_PREVIEW_SEED, i) for i in range(len(labels))]
    features = None
    for scale in refined_scales(ScaleSampler(tokenizer, transformer, labels, seeds, options)):
        features = scale.features
    assert features is not None, "a schedule has at least one scale"
    pictures = to_pil(tokenizer.decode_features(features))
    rows = [pictures[i : i + per_class] for i in range(0, len(pictures), per_class)]
    return save_picture(table(rows, row_names=list(class_names[:shown])), folder / f"samples-{step:08d}.png")


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
