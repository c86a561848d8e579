"""What a finished prior of the D-AR family leaves behind: a pipeline folder."""

import copy
import logging
from pathlib import Path

from accelerate import Accelerator
from transformers import LlamaForCausalLM

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.errors import UserError
from isthmus.generation.options import SamplingOptions
from isthmus.models.saved_model import without_values
from isthmus.pipelines.dar import DARPipeline
from isthmus.pipelines.labels import names_in_order
from isthmus.pipelines.loading import load_pipeline
from isthmus.training.checkpoints import gathered, written_or_explained
from isthmus.training.dar_config import NextTokenPriorRun
from isthmus.training.dar_export import TokenizerParts
from isthmus.training.ema import ExponentialMovingAverage
from isthmus.training.next_token_objective import NextTokenObjective
from isthmus.training.saved_networks import data_record, protocol

logger = logging.getLogger("isthmus")


def load_dar_model(path: str) -> tuple[TokenizerParts, LlamaForCausalLM, tuple[str, ...]]:
    """Everything of a saved pipeline, to go on training: tokenizer parts, prior, class names (none without names).

    Raises:
        UserError: there is none, or it is of another family.
    """
    pipeline = load_pipeline(path, device="cpu")
    if not isinstance(pipeline, DARPipeline):
        raise UserError(f"{path} holds a {type(pipeline).__name__}, no model of the D-AR family. Pass another model.")
    names = names_in_order(pipeline.class_names)
    parts = TokenizerParts(pipeline.image_tokenizer, pipeline.decoder, pipeline.scheduler)
    return parts, pipeline.transformer, names


def averaged_llama(model: NextTokenObjective, ema: ExponentialMovingAverage) -> LlamaForCausalLM:
    """A whole copy of the Llama that holds the averages, in eval mode, without the hooks of the loop.

    Every process must call it where weights are sharded.
    """
    source = model.transformer
    state = gathered(ema.averages_under("transformer."))
    with without_values():
        averaged = LlamaForCausalLM(source.config)
    averaged.load_state_dict({name: value.to(source.device, copy=True) for name, value in state.items()}, assign=True)
    # its table of angles is no weight, so it is still on the meta device
    averaged.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    return averaged.eval().requires_grad_(False)


def export_dar_pipeline(
    accelerator: Accelerator,
    parts: TokenizerParts,
    transformer: LlamaForCausalLM,
    options: SamplingOptions,
    run: NextTokenPriorRun,
    source: ImageSource | ImageStream,
) -> Path:
    """Write the pipeline into the run's folder: a trained run loads like a downloaded model.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if accelerator.is_main_process:
        pipeline = DARPipeline(
            image_tokenizer=parts.image_tokenizer,
            decoder=parts.decoder,
            transformer=transformer,
            scheduler=parts.scheduler,
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
