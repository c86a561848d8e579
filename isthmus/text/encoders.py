"""What a prior reads of a prompt, and a small encoder that is trained together with it.

A prior learns what the encoder's words mean from the captions of its images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.nn.attention import FeedForward, MultiHeadAttention, attention_to_words, trains_on_cpu
from isthmus.nn.saved_model import SavedModel, records_arguments
from isthmus.text.tokenizer import TextTokenizer

_START = 0  # begins every prompt, and fills rows up


@dataclass
class TextFeatures:
    """What a prior is told of a prompt: a vector per word, which of them count, and one vector of the whole."""

    hidden: Float[Tensor, "b words text_width"]
    mask: Bool[Tensor, "b words"]
    pooled: Float[Tensor, "b pooled_width"]

    def __len__(self) -> int:
        return len(self.pooled)

    def rows(self, index: Int[Tensor, " rows"] | slice) -> "TextFeatures":
        """The prompts of these rows, in their order."""
        return TextFeatures(self.hidden[index], self.mask[index], self.pooled[index])

    def where(self, chosen: Bool[Tensor, " b"], other: "TextFeatures") -> "TextFeatures":
        """These prompts, and the single one of `other` where `chosen` is False."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        one, two = self.padded(length), other.padded(length)
        return TextFeatures(
            torch.where(chosen[:, None, None], one.hidden, two.hidden),
            torch.where(chosen[:, None], one.mask, two.mask),
            torch.where(chosen[:, None], one.pooled, two.pooled),
        )

    def padded(self, length: int) -> "TextFeatures":
        """The same with rows of `length` words; what was added does not count."""
        more = length - self.mask.shape[1]
        return TextFeatures(F.pad(self.hidden, (0, 0, 0, more)), F.pad(self.mask, (0, more)), self.pooled)

    @staticmethod
    def joined(parts: "Sequence[TextFeatures]") -> "TextFeatures":
        """All prompts of the parts, one after the other."""
        length = max(part.mask.shape[1] for part in parts)
        whole = [part.padded(length) for part in parts]
        return TextFeatures(
            torch.cat([part.hidden for part in whole]),
            torch.cat([part.mask for part in whole]),
            torch.cat([part.pooled for part in whole]),
        )


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, num_heads, l2_attention=True)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 4 * width)

    def forward(
        self,
        x: Float[Tensor, "rows length width"],
        mask: Bool[Tensor, "b words"],
        places: Int[Tensor, " counted"] | None = None,
    ) -> Float[Tensor, "rows length width"]:
        """The stream behind the block; with `places` of the words that count, (1, counted, width) for all rows."""

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if places is None:
                return attention_to_words(q, k, v, mask, scale)
            q, k, v = (_laid_out(one, mask, places) for one in (q, k, v))
            # heads first and rows behind them: attention does not mind
            mixed = attention_to_words(q, k, v, mask[None, :, None], scale)
            return mixed.flatten(1, 2)[:, places].unsqueeze(0)

        x = x + self.attention(self.attention_norm(x), attend)
        return x + self.feed_forward(self.feed_forward_norm(x))


def _laid_out(
    x: Float[Tensor, "1 heads counted c"], mask: Bool[Tensor, "b words"], places: Int[Tensor, " counted"]
) -> Float[Tensor, "heads b words c"]:
    """Counted words of all rows, (heads, b, words, c), zeros at the others."""
    _, heads, _, c = x.shape
    return x.new_zeros(heads, mask.numel(), c).index_copy(1, places, x[0]).unflatten(1, mask.shape)


class SmallTextEncoder(SavedModel):
    """A few transformer blocks over byte-level words; every word sees every other.

    Args:
        merges: pairs of pieces that are joined to words, in order, as `learned_merges` finds them; without any a
            word is a byte.
        width: of the vector of a word, and of the whole prompt.
        num_layers: blocks; with 0 the prompt is the mean of its words (or their sum, see `sum_words`), wherever they
            stand: a bag of words.
        num_heads: attention heads.
        max_length: words that are read of a prompt.
        sum_words: whether the vector of a prompt has the sum of its words' own vectors in it, which begin as large as
            those of classes would. A prior hears single words much sooner: at the start the blocks make nearly the
            same vector of every prompt (docs/benchmarks.md).
    """

    later_arguments: ClassVar[Mapping[str, Any]] = {"sum_words": False}

    @records_arguments
    def __init__(
        self,
        *,
        merges: Sequence[Sequence[str]] = (),
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 48,
        sum_words: bool = False,
    ):
        super().__init__()
        if width % num_heads:
            raise UserError(f"width must be a multiple of num_heads, got width {width} and {num_heads} heads.")
        if max_length < 1:
            raise UserError(f"max_length must be at least 1, got {max_length}.")
        self.word_embedding = nn.Embedding(257 + len(merges), width)
        self.position = nn.Parameter(torch.empty(1, 1 + max_length, width)) if num_layers else None
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        if self.device.type != "meta":
            nn.init.normal_(self.word_embedding.weight, std=1.0 if sum_words else 0.02)
            if self.position is not None:
                nn.init.normal_(self.position, std=0.5 if sum_words else 0.02)

    @property
    def text_width(self) -> int:
        """Width of the vector of a word."""
        return self.config["width"]

    @property
    def pooled_width(self) -> int:
        """Width of the vector of a prompt."""
        return self.config["width"]

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """What makes words of prompts."""
        return TextTokenizer(merges=self.config["merges"], max_length=self.config["max_length"])

    def word_ids(
        self, prompts: Sequence[str], *, warn: bool = True
    ) -> tuple[Int[Tensor, "b words"], Bool[Tensor, "b words"]]:
        """Numbers of the words of each prompt behind the start word, and True where there is one; cut as by `words`."""
        found = self.tokenizer.words(prompts, warn=warn)
        length = 1 + max(map(len, found), default=0)
        ids = torch.full((len(found), length), _START)
        mask = torch.zeros((len(found), length), dtype=torch.bool)
        for row, words in enumerate(found):
            ids[row, 1 : 1 + len(words)] = torch.tensor(words, dtype=torch.int64) + 1
            mask[row, : 1 + len(words)] = True
        return ids.to(self.device), mask.to(self.device)

    def forward(self, ids: Int[Tensor, "b words"], mask: Bool[Tensor, "b words"]) -> TextFeatures:
        """Features of words by number; where `mask` is False nothing is seen. The start word stands for the whole."""
        if trains_on_cpu(self.word_embedding.weight) and len(ids) > 1:
            return self._of_counted(ids, mask)
        words, counted = self.word_embedding(ids), mask.unsqueeze(-1)
        summed = (words * counted).sum(dim=1) if self.config["sum_words"] else None
        if self.position is None:
            hidden = self.norm(words)
            mean = (hidden * counted).sum(dim=1) / counted.sum(dim=1)
            return TextFeatures(hidden, mask, mean if summed is None else summed)
        x = words + self.position[:, : ids.shape[1]]
        for block in self.blocks:
            x = self.run_block(block, x, mask)
        hidden = self.norm(x)
        return TextFeatures(hidden, mask, hidden[:, 0] if summed is None else hidden[:, 0] + summed)

    def _of_counted(self, ids: Int[Tensor, "b words"], mask: Bool[Tensor, "b words"]) -> TextFeatures:
        """`forward` of the words that count alone, in one row: half of captions padded to a batch's longest is not."""
        places = mask.flatten().nonzero().squeeze(1)
        words = self.word_embedding(ids.flatten()[places])
        rows = places // ids.shape[1]

        def summed(x: Float[Tensor, "counted width"]) -> Float[Tensor, "b width"]:
            return x.new_zeros(len(ids), x.shape[1]).index_add(0, rows, x)

        def laid_out(x: Float[Tensor, "counted width"]) -> Float[Tensor, "b words width"]:
            return x.new_zeros(mask.numel(), x.shape[1]).index_copy(0, places, x).unflatten(0, mask.shape)

        pooled = summed(words) if self.config["sum_words"] else None
        if self.position is None:
            hidden = self.norm(words)
            mean = summed(hidden) / mask.sum(dim=1, keepdim=True)
            return TextFeatures(laid_out(hidden), mask, mean if pooled is None else pooled)
        x = (words + self.position[0, places % ids.shape[1]]).unsqueeze(0)
        for block in self.blocks:
            x = self.run_block(block, x, mask, places)
        hidden = laid_out(self.norm(x)[0])
        return TextFeatures(hidden, mask, hidden[:, 0] if pooled is None else hidden[:, 0] + pooled)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts; the empty one stands for no prompt."""
        return self(*self.word_ids(prompts))
