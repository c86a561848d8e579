"""What a finished run of the D-AR family leaves behind: averaged networks in a folder that loads like any other."""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.errors import UserError
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.models.flow_decoder import FlowDecoder
from isthmus.pipelines.hub import model_folder
from isthmus.schedulers.flow_matching import FlowMatchingScheduler
from isthmus.training.checkpoints import written_or_explained
from isthmus.training.dar_config import DiffusionTokenizerRun
from isthmus.training.ema import ExponentialMovingAverage
from isthmus.training.saved_networks import TOKENIZER_FOLDER, averaged_model, tokenizer_record
from isthmus.training.tokenizer_with_decoder import TokenizerWithDecoder

logger = logging.getLogger("isthmus")

DECODER_FOLDER, SCHEDULER_FOLDER = "decoder", "scheduler"


@dataclass(frozen=True)
class TokenizerParts:
    """Everything that turns images into tokens and tokens into images."""

    image_tokenizer: DiffusionTokenizer
    decoder: FlowDecoder
    scheduler: FlowMatchingScheduler


def load_parts(path: str) -> TokenizerParts:
    """Tokenizer, decoder and scheduler in a run folder, a pipeline folder, or a model on the hub.

    Raises:
        UserError: there is none, it is of another family, or it does not load strictly.
    """
    folder = model_folder(path)
    for name in (TOKENIZER_FOLDER, DECODER_FOLDER):
        if not (folder / name / "config.json").is_file():
            raise UserError(
                "a D-AR tokenizer is the folder of a finished `isthmus train tokenizer` (or of a pipeline), got "
                f"{path}, which holds no {name}. Finish the run first: the same command continues it."
            )
    if not (folder / SCHEDULER_FOLDER / "scheduler_config.json").is_file():
        raise UserError(f"{path} lacks scheduler/scheduler_config.json. Copy or download it whole.")
    return TokenizerParts(
        DiffusionTokenizer.from_pretrained(folder / TOKENIZER_FOLDER),
        FlowDecoder.from_pretrained(folder / DECODER_FOLDER),
        FlowMatchingScheduler.from_pretrained(folder / SCHEDULER_FOLDER),
    )


def averaged_parts(model: TokenizerWithDecoder, ema: ExponentialMovingAverage) -> TokenizerParts:
    """Copies of tokenizer and decoder that hold the averages; the heads stay behind."""
    return TokenizerParts(
        averaged_model(model.image_tokenizer, ema, prefix="image_tokenizer."),
        averaged_model(model.decoder, ema, prefix="decoder."),
        model.scheduler,
    )


def export_parts(
    accelerator: Accelerator, parts: TokenizerParts, run: DiffusionTokenizerRun, source: ImageSource | ImageStream
) -> Path:
    """Write tokenizer, decoder and scheduler into the run's folder, the tokenizer last: with it all are there.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if accelerator.is_main_process:
        partial = run.out / "export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with written_or_explained(run.out / TOKENIZER_FOLDER, partial):
            parts.scheduler.save_pretrained(partial / SCHEDULER_FOLDER)
            parts.decoder.save_pretrained(partial / DECODER_FOLDER)
            parts.image_tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
            record = json.dumps(tokenizer_record(source), indent=2) + "\n"
            (partial / TOKENIZER_FOLDER / "training.json").write_text(record, encoding="utf-8")
        for name in (SCHEDULER_FOLDER, DECODER_FOLDER, TOKENIZER_FOLDER):
            shutil.rmtree(run.out / name, ignore_errors=True)
            (partial / name).rename(run.out / name)
        partial.rmdir()
        logger.info("tokenizer and decoder written to %s", run.out)
    accelerator.wait_for_everyone()
    return run.out
