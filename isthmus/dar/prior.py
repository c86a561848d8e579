"""The prior of the D-AR family: a stock `transformers.LlamaForCausalLM` over image tokens, never edited or subclassed.

Source: "D-AR: Diffusion via Autoregressive Models" (arXiv 2505.23660), section 3.3.
The classes are words of the vocabulary: ids 0..codebook_size - 1 are image tokens, then one id per class, then the null
class, and of a model that reads text the words of prompts behind it. A sequence is [class, token 0, ..., token N - 1],
and the output at the place before token p predicts it. Words stand before the class, and where there is none before the
null class, which begins every image: alone it asks for nothing. No class and no word is ever predicted: its row of the
head is zero, and every loss and every draw reads the first `codebook_size` logits alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

INIT_STD = 0.02


@dataclass(frozen=True)
class TokenLayout:
    """Which id of a Llama's vocabulary means what: codes, classes (0 for unlabelled models), the null class, words.

    `num_words` is the size of the vocabulary of prompts, of which at most `prompt_length` words are read; both are 0
    for models that read no text.

    >>> layout = TokenLayout(codebook_size=16384, num_classes=1000, num_tokens=256)
    >>> layout.vocab_size, layout.class_token(torch.tensor([0, layout.null_class_id]))
    (17385, tensor([16384, 17384]))
    """

    codebook_size: int
    num_classes: int
    num_tokens: int
    num_words: int = 0
    prompt_length: int = 0

    def __post_init__(self):
        if self.codebook_size < 1 or self.num_classes < 0 or self.num_tokens < 1:
            raise UserError(
                "a token layout needs at least one code, one token and no negative number of classes, got "
                f"codebook_size {self.codebook_size}, num_tokens {self.num_tokens}, num_classes {self.num_classes}. "
                "Pass the sizes of the image tokenizer and of the data."
            )
        if self.num_words < 0 or self.prompt_length < 0 or bool(self.num_words) != bool(self.prompt_length):
            raise UserError(
                "a prior that reads text has a vocabulary of words and a longest prompt, and another has neither, got "
                f"num_words {self.num_words} and prompt_length {self.prompt_length}. Pass those of the text tokenizer."
            )

    @property
    def null_class_id(self) -> int:
        """The label of no class."""
        return self.num_classes

    @property
    def first_word(self) -> int:
        """Vocabulary id of the first word of prompts, behind that of the null class."""
        return self.codebook_size + self.num_classes + 1

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: codes, classes, the null class and words."""
        return self.first_word + self.num_words

    @property
    def num_positions(self) -> int:
        """Longest sequence: words, the class, tokens."""
        return self.prompt_length + 1 + self.num_tokens

    def class_token(self, class_labels: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Vocabulary ids of labels 0..num_classes."""
        return class_labels + self.codebook_size

    def padded(self, words: Sequence[Sequence[int]]) -> "PaddedWords":
        """Prompts as numbers of words (from 0), in rows of the length of the longest."""
        longest = max(map(len, words), default=0)
        ids = torch.full((len(words), longest), self.first_word - 1)
        for row, own in enumerate(words):
            ids[row, longest - len(own) :] = torch.tensor(own, dtype=torch.long) + self.first_word
        return PaddedWords(ids, torch.tensor([len(own) for own in words]))

    @classmethod
    def of(cls, config: Any, codebook_size: int, num_tokens: int | None = None) -> "TokenLayout":
        """The layout of a Llama (its config, as `LlamaConfig` or stored) that predicts the tokens of a tokenizer.

        `num_tokens` None takes what the Llama has room for. Raises UserError where the two do not belong together, or
        the Llama has what no prior has: biases, tied embeddings, another activation or stretched positions.
        """
        wanted = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}
        found = {name: getattr(config, name) for name in wanted}
        rope: dict[str, Any] = dict(config.rope_parameters or {})
        for name, needed in (wanted | {"rope_type": "default"}).items():
            value = found.get(name, rope.get("rope_type", "default"))
            if value != needed:
                raise UserError(f"a prior is a Llama with {name} {needed!r}, got {value!r}. Pass a prior trained here.")
        other = "Pass the image tokenizer that the prior was trained on."
        trained_on = getattr(config, "codebook_size", codebook_size)
        if trained_on != codebook_size:
            raise UserError(
                f"image tokenizer and prior must have the same codebook_size, got {codebook_size} and {trained_on}. "
                f"{other}"
            )
        num_words, prompt_length = (getattr(config, name, 0) for name in ("num_words", "prompt_length"))
        num_classes = config.vocab_size - codebook_size - 1 - num_words
        if num_classes < 0:
            text = f", {num_words} words of prompts" if num_words else ""
            raise UserError(
                f"a prior's vocabulary holds all {codebook_size} codes of the image tokenizer, its classes and a null "
                f"class{text}, got {config.vocab_size} words. {other}"
            )
        room = config.max_position_embeddings - 1 - prompt_length
        if room < 1 or num_tokens not in (None, room):
            text = f" for each of {prompt_length} words," if prompt_length else ""
            raise UserError(
                f"a prior has one position{text} for the class and one per token, got "
                f"{config.max_position_embeddings} positions for {num_tokens or 'at least one'} token(s). {other}"
            )
        return cls(codebook_size, num_classes, room, num_words, prompt_length)


@dataclass
class PaddedWords:
    """Words before the class of each image, as ids of the vocabulary, each row filled up at its left end."""

    ids: Int[Tensor, "b words"]
    lengths: Int[Tensor, " b"]
    """How many words of each row count, at its right end."""

    def to(self, device: torch.device) -> "PaddedWords":
        """The same on a device."""
        return PaddedWords(self.ids.to(device), self.lengths.to(device))

    def rows(self, index: Int[Tensor, " rows"]) -> "PaddedWords":
        """Those of some rows, or of one several times."""
        return PaddedWords(self.ids[index], self.lengths[index])

    @property
    def padding(self) -> Int[Tensor, " b"]:
        """How many places at the left end of each row do not count."""
        return self.ids.shape[1] - self.lengths

    def places(self, length: int) -> dict[str, Tensor]:
        """Arguments of a Llama for rows of these words and `length` more ids: what counts, and at which position.

        Positions count from the first word of a row, so that filling it up changes nothing.
        """
        positions = torch.arange(self.ids.shape[1] + length, device=self.ids.device) - self.padding[:, None]
        return {"attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}


def llama_config(
    layout: TokenLayout, *, width: int, num_layers: int, num_heads: int, feed_forward_width: int | None = None
) -> "LlamaConfig":
    """Configuration of a prior; what its vocabulary holds stands beside Llama's settings, so that one under another
    tokenizer is noticed.

    Args:
        width: width of the residual stream, a multiple of twice `num_heads`.
        num_layers: blocks.
        num_heads: attention heads.
        feed_forward_width: inner width; None is the published rule, int(8 width / 3) rounded up to a multiple of 256.

    Raises UserError unless `width` is a multiple of twice `num_heads`.
    """
    if width % (2 * num_heads):
        raise UserError(
            f"width must be a multiple of twice the heads (rotary positions turn pairs of channels), got width {width} "
            f"and num_heads {num_heads}. Published heads are 64 wide."
        )
    # a model that reads no text has no such settings: its folder is what it was before there were any
    words = {"num_words": layout.num_words, "prompt_length": layout.prompt_length} if layout.num_words else {}
    settings = {
        "vocab_size": layout.vocab_size,
        "codebook_size": layout.codebook_size,
        **words,
        "hidden_size": width,
        "intermediate_size": feed_forward_width or -(-int(8 * width / 3) // 256) * 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": layout.num_positions,
        "rms_norm_eps": 1e-5,
        "initializer_range": INIT_STD,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    from transformers import LlamaConfig

    return LlamaConfig.from_dict(settings)


def new_prior(
    layout: TokenLayout, *, width: int, num_layers: int, num_heads: int, feed_forward_width: int | None = None
) -> "LlamaForCausalLM":
    """An untrained prior, by the arguments of `llama_config`: weights N(0, 0.02), norms one, and the head zero, so that
    every code is equally likely at first.
    """
    config = llama_config(
        layout, width=width, num_layers=num_layers, num_heads=num_heads, feed_forward_width=feed_forward_width
    )
    from transformers import LlamaForCausalLM

    prior = LlamaForCausalLM(config)
    with torch.no_grad():
        prior.lm_head.weight.zero_()
    return prior


def next_token_inputs(
    layout: TokenLayout,
    class_labels: Int[Tensor, " b"],
    token_ids: Int[Tensor, "b l"],
    words: PaddedWords | None = None,
) -> Int[Tensor, "b _"]:
    """Vocabulary ids of [words, class, tokens]: what the network reads. For training, leave out the last token."""
    said = [] if words is None else [words.ids]
    return torch.cat([*said, layout.class_token(class_labels).unsqueeze(1), token_ids.long()], dim=1)


def next_token_logits(
    transformer: "LlamaForCausalLM",
    layout: TokenLayout,
    class_labels: Int[Tensor, " b"],
    token_ids: Int[Tensor, "b l"],
    words: PaddedWords | None = None,
) -> Float[Tensor, "b l+1 v"]:
    """Teacher-forced logits of the codes, fp32: entry p predicts token p from the words, the class (0..num_classes, the
    last being the null label) and tokens 0..p - 1; the last entry predicts what follows the known tokens.
    """
    inputs, length = next_token_inputs(layout, class_labels, token_ids, words), 1 + token_ids.shape[1]
    output = transformer(input_ids=inputs, use_cache=False, **({} if words is None else words.places(length)))
    # classes and words are never predicted, so their rows of the head get no gradient
    return output.logits[:, -length:, : layout.codebook_size].float()


def next_token_loss(logits: Float[Tensor, "b l v"], token_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """Cross-entropy of every token, nats: -log p(token p | words, class, tokens before p)."""
    return F.cross_entropy(logits.transpose(1, 2), token_ids.long(), reduction="none")
