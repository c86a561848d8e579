"""Prompts in words: pieces of bytes (byte-level BPE) that are learned from captions, so that no prompt fails."""

import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, cast

from isthmus.errors import UserError
from isthmus.nn.component_files import CONFIG
from isthmus.nn.saved_model import Recorded, records_arguments

logger = logging.getLogger("isthmus")


class TextTokenizer(Recorded):
    """Prompts as numbers of words, which count from 0.

    Args:
        merges: pairs of pieces that are joined to words, in order, as `learned_merges` finds them; without any a
            word is a byte.
        max_length: words that are read of a prompt.
    """

    config_name = CONFIG

    @records_arguments
    def __init__(self, *, merges: Sequence[Sequence[str]] = (), max_length: int = 48):
        if max_length < 1:
            raise UserError(f"max_length must be at least 1, got {max_length}.")

    @property
    def num_words(self) -> int:
        """Size of the vocabulary."""
        return 256 + len(self.config["merges"])

    @cached_property
    def model(self) -> Any:
        """The same as a tokenizer of the `tokenizers` library, which cuts nothing."""
        from tokenizers.models import BPE

        merges = [tuple(pair) for pair in self.config["merges"]]
        words = [*_alphabet(), *(one + other for one, other in merges)]
        return _bpe(BPE({word: number for number, word in enumerate(words)}, cast("list[tuple[str, str]]", merges)))

    def words(self, prompts: Sequence[str], *, warn: bool = True) -> list[list[int]]:
        """Numbers of the words of each prompt.

        One that is too long is cut, with a warning that says where, or without one.
        """
        encoded, limit = self.model.encode_batch(list(prompts)), self.config["max_length"]
        for prompt, one in zip(prompts, encoded, strict=True):
            if warn and len(one.ids) > limit:
                first, end = one.offsets[limit]
                logger.warning(
                    "a prompt has %d words and only %d are read: it is cut before %r, after %r",
                    *(len(one.ids), limit, prompt[first:end].strip(), prompt[max(first - 40, 0) : first]),
                )
        return [one.ids[:limit] for one in encoded]

    def num_cut(self, prompts: Sequence[str]) -> int:
        """How many of these prompts are longer than what is read of them."""
        return sum(len(one.ids) > self.config["max_length"] for one in self.model.encode_batch(list(prompts)))


def learned_merges(captions: Iterable[str], *, num_words: int = 2000) -> list[list[str]]:
    """The pairs that make the commonest words of captions, for a vocabulary of `num_words`."""
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = _bpe(BPE())
    trainer = BpeTrainer(vocab_size=num_words, initial_alphabet=_alphabet(), show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    return [list(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _alphabet() -> list[str]:
    """A letter for each of the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _bpe(model: Any) -> Any:
    """A tokenizer that reads capitals as small letters and a word at the start as one behind a space."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import NFKC, Lowercase
    from tokenizers.normalizers import Sequence as InTurn
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = InTurn([NFKC(), Lowercase()])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer
