"""Whether the four components of a D-AR pipeline belong together."""

from typing import Any

from isthmus.errors import UserError
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.models.flow_decoder import FlowDecoder
from isthmus.models.next_token_prior import TokenLayout
from isthmus.schedulers.flow_matching import FlowMatchingScheduler


def shared_layout(
    image_tokenizer: DiffusionTokenizer, decoder: FlowDecoder, llama: Any, scheduler: FlowMatchingScheduler
) -> TokenLayout:
    """The vocabulary and sequence that tokenizer and prior share; `llama` is the prior's configuration.

    Raises:
        UserError: two of the four do not belong together, or the tokenizer has no token ids that a prior could draw.
    """
    tokenizer = image_tokenizer.config
    if not tokenizer["quantized"]:
        raise UserError(
            "a prior draws token ids, and this image tokenizer keeps its tokens continuous (quantized=False). "
            "Pass a tokenizer with a codebook."
        )
    if decoder.config["condition_width"] != tokenizer["condition_width"]:
        raise UserError(
            f"image tokenizer and decoder must have the same condition_width, got {tokenizer['condition_width']} and "
            f"{decoder.config['condition_width']}. Pass the decoder that was trained with this tokenizer."
        )
    if tokenizer["image_size"] % decoder.config["patch_size"]:
        raise UserError(
            f"the decoder's patch_size ({decoder.config['patch_size']}) must divide the tokenizer's image_size "
            f"({tokenizer['image_size']}). Pass the decoder that was trained with this tokenizer."
        )
    if decoder.config["canvas_tokens"] not in (None, tokenizer["num_tokens"]):
        raise UserError(
            f"a decoder's canvas_tokens are the tokenizer's num_tokens ({tokenizer['num_tokens']}), got "
            f"{decoder.config['canvas_tokens']}. Pass the decoder that was trained with this tokenizer."
        )
    wanted = {name: tokenizer[name] for name in ("num_tokens", "num_groups")}
    wanted["tokens_per_step"] = image_tokenizer.tokens_per_step
    found = {name: scheduler.config[name] for name in ("num_tokens", "num_groups")}
    found["tokens_per_step"] = scheduler.tokens_per_step
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(
                f"image tokenizer and scheduler must have the same {name}, got {value} and {found[name]}. "
                "Pass the scheduler that was saved with this tokenizer."
            )
    return TokenLayout.of(llama, tokenizer["codebook_size"], tokenizer["num_tokens"])
