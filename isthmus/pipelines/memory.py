"""How many images fit into memory at once: an estimate from the sizes of the networks."""

import os

import torch

from isthmus.pipelines.next_scale import NextScalePipeline

_LARGEST = 64  # larger batches are no faster, and progress is seen less often
_SHARE = 0.5  # of what is free: the allocator and everything else on the machine need the rest


def bytes_per_image(pipeline: NextScalePipeline, *, guided: bool) -> int:
    """Peak bytes that one more image in a batch takes, roughly.

    Whichever is larger: the last scale in the transformer (feed-forward, keys and values, logits and their sorted and
    cumulated copies), or the widest maps of the pixel decoder.
    """
    config, schedule = pipeline.transformer.config, pipeline.schedule
    width, tokens, rows = config["width"], schedule.lengths[-1], 2 if guided else 1
    size = 2 if pipeline.transformer.dtype == torch.bfloat16 else 4
    block = tokens * width * (10 + 2 * config["mlp_ratio"]) * size
    cache = 0 if pipeline.transformer.is_markov else 2 * config["num_layers"] * schedule.num_tokens * width * size
    logits = tokens * config["codebook_size"] * 4 * 2
    draw = tokens * config["codebook_size"] * (5 * 4 + 2 * 8)
    tokenizer = pipeline.image_tokenizer
    pixels = tokenizer.image_size**2 * tokenizer.config["base_channels"] * 4 * 6
    return int(max(rows * (block + cache + logits) + draw, pixels))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; for mps and systems that do not say, 4 GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * 2**30


def batch_size_that_fits(pipeline: NextScalePipeline, *, guided: bool) -> int:
    """Images per batch for this pipeline where it is now: 1..64."""
    fitting = int(_SHARE * free_bytes(pipeline.device)) // bytes_per_image(pipeline, guided=guided)
    return max(1, min(_LARGEST, fitting))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
