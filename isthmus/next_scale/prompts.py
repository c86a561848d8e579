"""What a text encoder makes of prompts, and what stands for no words: the null text beside a model.

Prompts are read once each, however many images are of one. The null text is what the encoder made of the empty prompt.
It is kept in the model's folder, so that a model without its encoder is guided all the same (spec of Switti, 16.3).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from isthmus.errors import UserError
from isthmus.next_scale.sampling import AskedTexts
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.pipelines.prompts import Asked
from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.reading import TextReader

if TYPE_CHECKING:
    from isthmus.text.pretrained import PretrainedTextEncoder

    TextEncoder = SmallTextEncoder | PretrainedTextEncoder

NULL_TEXT = "null_text.safetensors"
_PARTS = ("hidden", "mask", "pooled")


def read_texts(asked: Asked, reader: TextReader | None, null_text: TextFeatures) -> AskedTexts:
    """What the transformer is told: every distinct prompt read once, what guidance leads away from behind them.

    `null_text` says where the results lie. UserError where there are prompts and no reader.
    """

    def read(prompts: Sequence[str]) -> list[TextFeatures]:
        if reader is None:
            raise UserError(
                "this model was saved without its text encoder, so it reads no words: pass text=, what that encoder "
                f"made of them elsewhere, got the prompt {prompts[0]!r}."
            )
        return [reader(prompts)]

    device = null_text.pooled.device
    null = [null_text] if asked.negative_prompt == "" else read([asked.negative_prompt])
    if isinstance(asked.texts, TextFeatures):
        parts, rows = [moved(asked.texts, device)], list(asked.rows)
    else:
        prompts = asked.prompts or []
        known = {one: one for one in prompts if one not in ("", asked.negative_prompt)}
        parts = read(list(known)) if known else []
        # the stored null text stands for the empty prompt, wherever that is asked for
        words = [*known] + [""] * ("" in prompts and asked.negative_prompt != "")
        parts += [null_text] * (len(words) - len(known))
        place = {one: row for row, one in enumerate([*words, asked.negative_prompt])}
        rows = [place[one] for one in prompts]
    return AskedTexts(TextFeatures.joined([*parts, *null]), torch.tensor(rows, device=device))


def moved(text: TextFeatures, device: torch.device) -> TextFeatures:
    """The same on a device."""
    return TextFeatures(text.hidden.to(device), text.mask.to(device), text.pooled.to(device))


def check_widths(text_width: int, pooled_width: int, transformer: NextScaleTransformer, what: str) -> None:
    """Raise UserError unless `what` has the widths of the text that the transformer reads."""
    asked = {"text_width": text_width, "text_pooled_width": pooled_width}
    for name, got in asked.items():
        wanted = transformer.config[name]
        # a model of the whole alone looks at no words
        if wanted is not None and got != wanted:
            raise UserError(
                f"{what} must have the {name} of the transformer, {wanted}, got {got}. Pass the text encoder that it "
                "was trained with."
            )


def save_null_text(text: TextFeatures, folder: Path) -> None:
    """Write the null text into a model's folder."""
    # copies: the vector of the whole may be a view of that of a word
    parts = {name: getattr(text, name).detach().cpu() for name in _PARTS}
    copies = {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
    save_file(copies, folder / NULL_TEXT)


def read_null_text(folder: Path) -> TextFeatures | None:
    """The null text in a model's folder, on the CPU, None where there is none; UserError where it is damaged."""
    path = folder / NULL_TEXT
    if not path.is_file():
        return None
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}). Copy it again.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if stored.keys() != set(_PARTS) or not _is_one_text(stored):
        raise UserError(
            f"{path} must hold one text as hidden (1, l, d), mask (1, l) and pooled (1, p), got {shapes}. Save the "
            "model again."
        )
    return TextFeatures(**stored)


def _is_one_text(stored: dict[str, torch.Tensor]) -> bool:
    hidden, mask, pooled = (stored[name] for name in _PARTS)
    shapes = (hidden.dim(), pooled.dim(), hidden.shape[:2], pooled.shape[0])
    finite = all(bool(one.isfinite().all()) for one in (hidden, pooled) if not one.is_meta)
    return shapes == (3, 2, mask.shape, 1) and mask.shape[0] == 1 and mask.dtype == torch.bool and finite
