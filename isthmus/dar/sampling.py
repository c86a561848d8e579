"""Generation of next-token models, token by token and group by group.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models" (arXiv 2505.23660), section 3.3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.dar.llama_decoding import LlamaCache, LlamaDecoder
from isthmus.dar.prior import TokenLayout, next_token_inputs
from isthmus.errors import UserError
from isthmus.nn.draws import token_uniforms
from isthmus.nn.guidance import guidance_values
from isthmus.nn.sampling import draw_tokens, filter_logits
from isthmus.nn.stored_llama import StoredLlama
from isthmus.pipelines.options import SamplingOptions

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass
class AskedWords:
    """Prompts as numbers of words, from 0: of each image, and what guidance leads away from."""

    words: Sequence[Sequence[int]]
    negative: Sequence[int] = ()


@dataclass
class Prefix:
    """Tokens that are read and not drawn: of row i, the first `lengths[i]`."""

    token_ids: Int[Tensor, "b p"]
    lengths: list[int]


def generate_tokens(
    transformer: "LlamaForCausalLM | StoredLlama",
    layout: TokenLayout,
    class_labels: Int[Tensor, " b"],
    image_seeds: Sequence[tuple[int, int]],
    options: SamplingOptions | Sequence[SamplingOptions],
    *,
    stops: Sequence[int],
    prefix: Prefix | None = None,
    decoder: LlamaDecoder | None = None,
    texts: AskedWords | None = None,
) -> Iterator[Int[Tensor, "b _"]]:
    """Draw tokens and yield them, (b, n), up to each stop as soon as they exist.

    Args:
        class_labels: 0..num_classes; num_classes is the null label, for which guidance is off where no words are asked
            for either.
        image_seeds: one (seed, image index) per image. Every random number of an image follows from its own pair.
        options: for all images, or one per image. Guidance given as a sequence or a schedule runs over the tokens.
        stops: token counts, not decreasing; item i of the result holds tokens stops[i - 1]..stops[i] - 1. After the
            last one nothing more is computed.
        decoder: laid-out weights to use again; None lays them out for this call.
        texts: prompts, of models that read text; None asks for no words.

    Raises UserError, before the first tokens are asked for, unless there are options for every image, and guidance for
    every token. All else is the caller's to check (`SamplingOptions.check`); `smooth` means nothing here.
    """
    batch, labels = len(class_labels), class_labels.tolist()
    each = [options] * batch if isinstance(options, SamplingOptions) else list(options)
    if len(each) != batch:
        raise UserError(f"sampling options are needed per image, got {len(each)} for {batch} images.")
    prefix = prefix or Prefix(class_labels.new_zeros(batch, 0), [0] * batch)
    texts = texts or AskedWords([()] * batch)
    draws = _Draws(layout, labels, image_seeds, each, prefix, transformer.device, texts)
    if decoder is not None:
        decoder.check_belongs(StoredLlama.of(transformer), layout)
    if all(stop <= draws.known for stop in stops):
        return (draws.tokens[:, start:stop].clone() for start, stop in pairwise((0, *stops)))
    return draws.turns(decoder or LlamaDecoder(transformer, layout, num_rows=draws.num_rows), stops)


class _Draws:
    """The tokens of a request, prefixes first, and all that is known of their draws before the first one."""

    def __init__(
        self,
        layout: TokenLayout,
        labels: Sequence[int],
        image_seeds: Sequence[tuple[int, int]],
        options: Sequence[SamplingOptions],
        prefix: Prefix,
        device: torch.device,
        texts: AskedWords,
    ):
        self.layout, self.prefix_lengths, self.texts = layout, prefix.lengths, texts
        # tokens that all images know
        self.known = min(prefix.lengths)
        self.tokens = torch.zeros(len(labels), layout.num_tokens, dtype=torch.long, device=device)
        self.tokens[:, : prefix.token_ids.shape[1]] = prefix.token_ids.to(device)
        # an image that asks for nothing else than the null rows has nothing to be guided away from
        null = (layout.null_class_id, tuple(texts.negative))
        guidance = [
            guidance_values(1.0 if (label, tuple(words)) == null else one.guidance_scale, layout.num_tokens)
            for one, label, words in zip(options, labels, texts.words, strict=True)
        ]
        # per token, whether any image is guided there
        self.guided = [any(value != 1 for value in column) for column in zip(*guidance, strict=True)]
        self.guidance = torch.tensor(guidance, device=device, dtype=torch.float32)
        temperatures = [[one.temperature_at(0)] for one in options]
        self.temperature = torch.tensor(temperatures, device=device, dtype=torch.float32)
        rows_of: dict[tuple[int | None, float | None], list[int]] = {}
        for row, one in enumerate(options):
            rows_of.setdefault((one.top_k, one.top_p), []).append(row)
        self.filters = [(*filters, torch.tensor(rows, device=device)) for filters, rows in rows_of.items()]
        self.uniforms = token_uniforms(image_seeds, 0, layout.num_tokens).to(device)
        self.class_labels = torch.tensor(labels, device=device)
        # tokens for which null rows run: up to the last guided one, whose attention reads the keys of all before
        self.with_null = max((position + 1 for position, guided in enumerate(self.guided) if guided), default=0)
        self.num_rows = len(labels) * (2 if self.known < self.with_null else 1)

    def draw(self, logits: Float[Tensor, "rows v"], position: int) -> Int[Tensor, " b"]:
        """Guide, temper, filter and draw one token per image; null rows lie behind the others."""
        batch = len(self.class_labels)
        cond, uncond = logits[:batch], logits[batch:]
        if self.guided[position]:
            cond = torch.lerp(uncond, cond, self.guidance[:, position : position + 1])
        cond = cond / self.temperature
        for top_k, top_p, rows in self.filters:
            if len(self.filters) == 1:
                cond = filter_logits(cond, top_k=top_k, top_p=top_p)
            elif (top_k, top_p) != (None, None):
                cond = cond.index_copy(0, rows, filter_logits(cond[rows], top_k=top_k, top_p=top_p))
        return draw_tokens(cond.unsqueeze(1), self.uniforms[:, position : position + 1]).squeeze(1)

    def predict(self, decoder: LlamaDecoder, cache: LlamaCache, position: int) -> Float[Tensor, "rows v"]:
        """Logits of the token at `position`; the first call also reads words, class and what all images know."""
        halves = 2 if position < self.with_null else 1
        if position > self.known:
            return decoder.step(self.tokens[:, position - 1].repeat(halves), cache)
        labels = torch.cat([self.class_labels, torch.full_like(self.class_labels, self.layout.null_class_id)][:halves])
        known = self.tokens[:, : self.known].repeat(halves, 1)
        if not self.layout.num_words:
            return decoder.prefill(next_token_inputs(self.layout, labels, known), cache)
        batch = len(self.class_labels)
        said = [*self.texts.words, *([self.texts.negative] * batch if halves == 2 else ())]
        words = self.layout.padded(said).to(labels.device)
        # rows that begin with the same words, class and tokens are read once: null rows, and images of one prompt
        inputs, rows = next_token_inputs(self.layout, labels, known, words).unique(dim=0, return_inverse=True)
        padding = words.padding.new_zeros(len(inputs)).scatter(0, rows, words.padding)
        return decoder.prefill(inputs, cache, padding, rows)

    def turns(self, decoder: LlamaDecoder, stops: Sequence[int]) -> Iterator[Int[Tensor, "b _"]]:
        """Draw from left to right."""
        lengths, tokens, cache = self.prefix_lengths, self.tokens, decoder.new_cache(self.num_rows)
        forced = torch.arange(tokens.shape[1], device="cpu") < torch.tensor(lengths, device="cpu").unsqueeze(1)
        forced = forced.to(tokens.device)
        for start, stop in pairwise((0, *stops)):
            # left before the yield: around it, it would also hold for whoever reads the tokens
            with torch.inference_mode():
                for position in range(max(start, self.known), stop):
                    drawn = self.draw(self.predict(decoder, cache, position), position)
                    if position < max(lengths):
                        drawn = torch.where(forced[:, position], tokens[:, position], drawn)
                    tokens[:, position] = drawn
            yield tokens[:, start:stop].clone()
