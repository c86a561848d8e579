"""What a D-AR picture keeps of another one: its first tokens, which hold the layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from isthmus.errors import UserError
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.pipelines.images import ImageInput, to_images

TokenInput = Shaped[Tensor, "*dims"] | Sequence[Any]
"""Tokens (b, n) of several images or (n,) of one: a tensor of integers, or lists as LLM servers return them."""
PrefixLengths = int | Sequence[int] | None


@dataclass
class Prefix:
    """Tokens that are read and not drawn.

    Attributes:
        token_ids: (b, p), one row per image.
        lengths: how many of them hold, per image.
    """

    token_ids: Int[Tensor, "b p"]
    lengths: list[int]


def encode_images(image_tokenizer: DiffusionTokenizer, images: ImageInput) -> Int[Tensor, "b n"]:
    """All tokens of images, coarse to fine, on the CPU.

    Raises:
        UserError: the images are not usable, or have sides that the tokenizer's patch does not divide.
    """
    pixels = to_images(images, image_tokenizer.config["image_size"]).to(image_tokenizer.device)
    with torch.inference_mode():
        token_ids = image_tokenizer.encode(pixels).token_ids
    # copied out of inference mode: a tensor the caller may use anywhere
    return token_ids.cpu().clone()


def to_token_ids(image_tokenizer: DiffusionTokenizer, token_ids: TokenInput) -> Int[Tensor, "b n"]:
    """Tokens as people and servers give them, one row per image.

    Raises:
        UserError: they are no integers, rows have different lengths, there are more than an image has, or an id names
            no code.
    """
    if not isinstance(token_ids, Tensor):
        try:
            token_ids = torch.tensor(token_ids)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"token_ids must be integers, equally many per image, got {type(token_ids).__name__} ({error}). Pass a "
                "tensor (b, n) or lists of equal lengths."
            ) from error
    rows = token_ids.unsqueeze(0) if token_ids.ndim == 1 else token_ids
    if rows.ndim != 2 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise UserError(
            f"token_ids must be integers of shape (n,) or (b, n), got {token_ids.dtype} of shape "
            f"{tuple(token_ids.shape)}. Pass what encode returned."
        )
    most = image_tokenizer.config["num_tokens"]
    if rows.shape[1] > most:
        raise UserError(f"an image has {most} tokens, got {rows.shape[1]}. Leave out the class, and what follows.")
    image_tokenizer.check_token_ids(rows)
    return rows


def resolve_prefix(
    image_tokenizer: DiffusionTokenizer,
    num_images: int,
    image: ImageInput | None,
    token_ids: TokenInput | None,
    lengths: PrefixLengths,
) -> Prefix | None:
    """The prefix of every image of a request; None where none was asked for.

    Args:
        image_tokenizer: encodes `image`, and knows which ids there are.
        num_images: images of the request; a single prefix serves all of them.
        image: where the first tokens come from, or
        token_ids: the tokens themselves.
        lengths: how many tokens are kept, for all images or for each; None keeps all of `token_ids`.

    Raises:
        UserError: both or neither source is given, a number is out of range, or an id names no code.
    """
    if image is None and token_ids is None:
        if lengths is not None:
            raise UserError("prefix_tokens says how much of a prefix is kept, but there is none. Pass prefix_image.")
        return None
    if image is not None and token_ids is not None:
        raise UserError("a prefix comes from an image or is given as tokens, got both. Pass one of them.")
    if image is not None:
        if lengths is None:
            raise UserError("prefix_image needs prefix_tokens: how many tokens of the image are kept.")
        token_ids = encode_images(image_tokenizer, image)
    assert token_ids is not None
    rows = to_token_ids(image_tokenizer, token_ids)
    if len(rows) not in (1, num_images):
        raise UserError(f"a prefix is one for all images or one for each ({num_images}), got {len(rows)}.")
    rows = rows.expand(num_images, -1)
    return Prefix(rows, _lengths(lengths, rows))


def _lengths(lengths: PrefixLengths, rows: Int[Tensor, "b p"]) -> list[int]:
    num_images, given = rows.shape
    kept = given if lengths is None else lengths
    each = [kept] * num_images if isinstance(kept, int) else list(kept)
    if len(each) != num_images:
        raise UserError(f"prefix_tokens is one number, or one per image ({num_images}), got {len(each)}.")
    if not all(0 <= length <= given for length in each):
        raise UserError(f"prefix_tokens must lie in 0..{given} (the tokens there are), got {each}.")
    return each
