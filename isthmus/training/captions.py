"""Captions in training: what a sample is told, and the encoder that reads it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TypeVar

from jaxtyping import Int
from torch import Tensor

from isthmus.data.source import ImageSource, ImageStream
from isthmus.data.token_cache import TokenCache
from isthmus.errors import UserError
from isthmus.nn.component_files import read_config
from isthmus.nn.draws import CAPTION, stream
from isthmus.nn.saved_model import without_values
from isthmus.text.encoders import SmallTextEncoder
from isthmus.text.pretrained import PretrainedTextEncoder
from isthmus.text.reading import TextReader
from isthmus.text.tokenizer import TextTokenizer, learned_merges
from isthmus.training.config import SMALL, TextConfig
from isthmus.training.images import dropped
from isthmus.training.previews import PREVIEW_SEED
from isthmus.training.saved_networks import refuse_contradictions

logger = logging.getLogger("isthmus")

TextEncoder = SmallTextEncoder | PretrainedTextEncoder
Reader = TypeVar("Reader", SmallTextEncoder, TextTokenizer)

_KEPT_BYTES = 2**30
# rows of a preview, and letters of a caption beside one
_SHOWN_CAPTIONS, _NAME_LENGTH = 10, 60


def encoder_of(config: TextConfig, saved: TextEncoder | None, name: str = "") -> TextEncoder | None:
    """What reads the captions of a run: a new small encoder (no words yet, no values), a frozen one, or that of the
    saved model `name`; None where nothing is said of text.

    Raises UserError for a folder that holds no encoder, and for settings that contradict the saved one.
    """
    sizes = ("width", "num_layers", "num_heads", "max_length")
    wanted = {size: value for size in sizes if (value := getattr(config, size)) is not None}
    if saved is not None and config.encoder in ("", SMALL):
        if isinstance(saved, SmallTextEncoder):
            refuse_contradictions(saved.config, wanted, name, options="text")
            refused = {"num_words": config.num_words}
        elif config.encoder == SMALL:
            raise UserError(f"{name} was trained with a frozen text encoder, got --text small. Leave it out.")
        else:
            refused = {**wanted, "num_words": config.num_words}
        for setting, value in refused.items():
            if value is not None:
                raise UserError(
                    f"{name} keeps its text encoder, words included, got text.{setting} {value}. Leave it out."
                )
        return saved
    if config.encoder == SMALL:
        with without_values():
            return SmallTextEncoder(sum_words=True, **wanted)
    if not config.encoder:
        return None
    folder = Path(config.encoder).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"text.encoder must be small or the folder of a text encoder, got {config.encoder}, which is no folder."
        )
    if (folder / "config.json").is_file() and read_config(folder).get("_class_name") == PretrainedTextEncoder.__name__:
        if wanted:
            raise UserError(f"{folder} has its max_length, got text.max_length {wanted['max_length']}. Leave it out.")
        return PretrainedTextEncoder.from_pretrained(folder)
    return PretrainedTextEncoder.from_folders(folder, **wanted)


def with_words(planned: Reader, captions: Sequence[str], num_words: int | None) -> Reader:
    """The planned encoder, with first weights, or the planned tokenizer, with the words of these captions."""
    merges = learned_merges(captions) if num_words is None else learned_merges(captions, num_words=num_words)
    return type(planned)(**{**planned.config, "merges": merges})


def warn_of_cut_captions(tokenizer: TextTokenizer, captions: Sequence[str]) -> None:
    """Say once how many captions are longer than what is read of them; training then cuts them in silence."""
    if cut := tokenizer.num_cut(captions):
        logger.warning(
            "%d of %d captions are longer than the %d words that are read; what comes later is not learned",
            *(cut, len(captions), tokenizer.config["max_length"]),
        )


def check_captions(*splits: ImageSource | ImageStream) -> None:
    """Raise UserError unless these data have captions."""
    for source in splits:
        if not (source.has_captions if isinstance(source, ImageStream) else source.captions is not None):
            raise UserError(
                f"a prior of texts is trained on images with captions, {source.name} has none. Use avatars, write a "
                ".txt beside each image, or name a --caption-column."
            )


def shown_captions(held_out: ImageSource) -> tuple[list[int], list[str]]:
    """Some held-out images whose captions previews are drawn from, and what stands beside the rows."""
    assert held_out.captions is not None, "checked at the start"
    # drawn: classes may take turns, of which even steps would show one
    order = stream(PREVIEW_SEED, CAPTION).permutation(len(held_out))
    shown: list[int] = sorted(order[:_SHOWN_CAPTIONS].tolist())
    return shown, [shorten(held_out.captions[i], _NAME_LENGTH, placeholder="...") for i in shown]


class Captions:
    """What every training sample is told: a caption of its image, in other words each time where the data know how.

    Decided per training position, by (seed, position): neither the batch nor the number of processes matters.

    Args:
        source: the data, which know how to vary a caption.
        texts: the caption of each image.
        drop: share of the samples that are told nothing, the same that lose their class.
        seed: of the run.
    """

    def __init__(self, source: ImageSource | ImageStream, texts: Sequence[str], *, drop: float, seed: int):
        self.source, self.texts, self.drop, self.seed = source, texts, drop, seed

    def told(self, images: Int[Tensor, " b"], positions: Int[Tensor, " b"]) -> list[str]:
        """The caption of each sample, from the numbers of images and positions; "" where it was dropped."""
        gone = dropped(positions, rate=self.drop, seed=self.seed).tolist()
        rows = zip(images.tolist(), positions.tolist(), gone, strict=True)
        return ["" if lost else self._varied(image, position) for image, position, lost in rows]

    def _varied(self, image: int, position: int) -> str:
        return self.source.varied_caption(self.texts[image], stream(self.seed, CAPTION, position))


class FrozenFeatures(TextReader):
    """What a frozen encoder makes of captions: each is read once, and up to a gibibyte of results is kept."""

    encoder: PretrainedTextEncoder

    def __init__(self, encoder: PretrainedTextEncoder, *, kept_bytes: int = _KEPT_BYTES):
        super().__init__(encoder, kept_bytes=kept_bytes)

    def keep_beside(self, cache: TokenCache, train: ImageSource | ImageStream, held_out: Sequence[str]) -> None:
        """Keep what the encoder makes of the captions that training reads as they are in the folder of the token cache.

        These are the empty one, those of held-out images, and those of all images unless the data vary them.
        """
        said = type(train).varied_caption in (ImageSource.varied_caption, ImageStream.varied_caption)
        self.keep_in(cache.path, ["", *held_out, *((cache.captions or ()) if said else ())])
