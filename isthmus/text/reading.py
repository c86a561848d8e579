"""Prompts that are read once: what an encoder made of them is remembered, as much as a bound allows."""

from collections.abc import Sequence

import torch

from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.pretrained import PretrainedTextEncoder

_AT_ONCE = 32  # prompts in one pass of the encoder


class TextReader:
    """What an encoder makes of prompts: each is read once, and up to so many bytes of results are kept.

    Args:
        encoder: whose weights do not change meanwhile.
        kept_bytes: the oldest results go first where there are more; at least one is kept.
    """

    def __init__(self, encoder: SmallTextEncoder | PretrainedTextEncoder, *, kept_bytes: int = 2**28):
        self.encoder, self._kept_bytes, self._bytes = encoder, kept_bytes, 0
        self._known: dict[str, TextFeatures] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts on the encoder's device, padded to the longest."""
        asked = dict.fromkeys(prompts)
        found = {prompt: self._known[prompt] for prompt in asked if prompt in self._known}
        new = [prompt for prompt in asked if prompt not in found]
        for start in range(0, len(new), _AT_ONCE):
            some = new[start : start + _AT_ONCE]
            read = self.encoder.encode(some)
            for row, prompt in enumerate(some):
                found[prompt] = self._keep(prompt, read.rows(slice(row, row + 1)))
        return TextFeatures.joined([found[prompt] for prompt in prompts])

    def _keep(self, prompt: str, text: TextFeatures) -> TextFeatures:
        length = int(text.mask[0].nonzero().max()) + 1
        # copies: a view would keep the whole batch
        own = TextFeatures(text.hidden[:, :length].clone(), text.mask[:, :length].clone(), text.pooled.clone())
        self._known[prompt] = own
        self._bytes += text_bytes(own)
        while self._bytes > self._kept_bytes and len(self._known) > 1:
            self._bytes -= text_bytes(self._known.pop(next(iter(self._known))))
        return own


def text_bytes(text: TextFeatures) -> int:
    """Bytes that features take."""
    return sum(part.numel() * part.element_size() for part in (text.hidden, text.mask, text.pooled))
