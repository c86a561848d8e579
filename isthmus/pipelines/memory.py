"""How many images fit into memory at once: an estimate from the sizes of the networks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from isthmus.errors import UserError
from isthmus.pipelines.free_memory import images_that_fit
from isthmus.pipelines.saved import SavedPipeline

if TYPE_CHECKING:
    from isthmus.models.flow_decoder import FlowDecoder
    from isthmus.models.stored_llama import StoredLlama


def next_token_bytes(transformer: "StoredLlama", *, guided: bool) -> int:
    """Keys and values of one image's sequence, and the logits of one token with their sorted and cumulated copies."""
    config, rows = transformer.config, 2 if guided else 1
    size = 2 if transformer.dtype == torch.bfloat16 else 4
    cache = 2 * config.num_hidden_layers * config.max_position_embeddings * config.hidden_size * size
    draw = config.vocab_size * (5 * 4 + 2 * 8)
    return rows * cache + draw


def flow_bytes(decoder: "FlowDecoder", image_size: int) -> int:
    """Rows of one image inside a block of the pixel decoder: stream, modulation, feed-forward, attention."""
    config = decoder.config
    size = 2 if decoder.dtype == torch.bfloat16 else 4
    rows = (image_size // config["patch_size"]) ** 2
    return rows * config["width"] * (2 + 6 + 2 * 4 + 6) * size + 8 * 3 * image_size**2 * 4


def batch_size_that_fits(pipeline: SavedPipeline, *, guided: bool) -> int:
    """Images per batch for this pipeline where it is now: 1..64."""
    return images_that_fit(pipeline.device, pipeline.bytes_per_image(guided=guided))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


@contextmanager
def naming_next_batch_size(batch_size: int) -> Iterator[None]:
    """Where memory runs out in the block: one error that names the --batch-size to try next.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"Try --batch-size {batch_size // 2}."
        advice = smaller if batch_size > 1 else "Use a smaller model or --dtype bfloat16."
        raise UserError(f"memory ran out at batch size {batch_size}. {advice}") from error
