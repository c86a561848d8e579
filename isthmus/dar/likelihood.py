"""The exact probability that a next-token model gives to the tokens of an image, and classification by it.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models" (arXiv 2505.23660), section 3.3: the tokens of an
image are a sentence of a Llama, so log p(tokens | class) is a sum over them. How classes are chosen by it:
`isthmus.pipelines.classification`, a stage being some groups of tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.dar.prior import PaddedWords, TokenLayout, next_token_inputs, next_token_logits, next_token_loss
from isthmus.pipelines.classification import CandidateScores, Pairs, score_pairs

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@torch.no_grad()
def log_likelihood(
    transformer: "LlamaForCausalLM",
    layout: TokenLayout,
    token_ids: Int[Tensor, "b l"],
    class_labels: Int[Tensor, " labels"],
    words: PaddedWords | None = None,
) -> Float[Tensor, "b l"]:
    """Nats of every token, log p(token | words, class, tokens before it); a row's sum is log p of its tokens together.

    Tokens count from the first of the image on, and may be fewer than all; labels are 0..num_classes, the last being
    the null label.
    """
    token_ids, class_labels = token_ids.to(transformer.device), class_labels.to(transformer.device)
    words = None if words is None else words.to(transformer.device)
    logits = next_token_logits(transformer, layout, class_labels, token_ids[:, :-1], words)
    return -next_token_loss(logits, token_ids)


def classified_lengths(num_tokens: int, tokens_per_group: int) -> list[int]:
    """Tokens between two looks at which candidates are dropped: a group, another one, two, four and so on.

    As many are read again as before, as from scale to scale of a pyramid: after every group the passes would be so many
    and so short that dropping costs more than it saves.

    >>> classified_lengths(256, 32), classified_lengths(24, 4)
    ([32, 32, 64, 128], [4, 4, 8, 8])
    """
    lengths = [tokens_per_group]
    while (left := num_tokens - sum(lengths)) > 0:
        lengths.append(min(sum(lengths), left))
    return lengths


@torch.no_grad()
def score_classes(
    transformer: "LlamaForCausalLM",
    layout: TokenLayout,
    token_ids: Int[Tensor, "rows l"],
    candidates: Sequence[int],
    *,
    tokens_per_group: int,
    keep: int = 1,
    margin_nats: float | None = None,
    num_views: int = 1,
    tokens_at_once: int | None = None,
    words: PaddedWords | None = None,
) -> CandidateScores:
    """Log-likelihoods of images under every candidate class or prompt, see `score_pairs`.

    Args:
        token_ids: all tokens of b * num_views rows; the views of an image lie next to each other.
        candidates: class ids.
        tokens_per_group: after so many tokens candidates are first dropped; see `classified_lengths`.
        num_views: rows per image, whose log-likelihoods are averaged.
        tokens_at_once: bounds the memory: tokens that one pass reads and whose keys are held; None is no bound. The
            answers do not depend on it.
        words: a prompt for each of `candidates`, where the model reads text.
    """
    pairs = _Pairs(transformer, layout, token_ids, candidates, tokens_per_group, num_views, tokens_at_once, words)
    return score_pairs(pairs, keep=keep, margin_nats=margin_nats)


class _Pairs(Pairs):
    """Sequences of tokens behind classes and words. Words and class are read with the first group."""

    def __init__(
        self,
        transformer: "LlamaForCausalLM",
        layout: TokenLayout,
        token_ids: Int[Tensor, "rows l"],
        candidates: Sequence[int],
        tokens_per_group: int,
        num_views: int,
        tokens_at_once: int | None,
        words: PaddedWords | None,
    ):
        super().__init__(
            classified_lengths(token_ids.shape[1], tokens_per_group),
            num_images=len(token_ids) // num_views,
            num_candidates=len(candidates),
            num_views=num_views,
            tokens_at_once=tokens_at_once,
            row_tokens=1 + (0 if words is None else words.ids.shape[1]),
            looks_back=True,
            device=transformer.device,
        )
        self.transformer, self.layout = transformer, layout
        self.token_ids = token_ids.to(self.device)
        self.labels = torch.tensor(list(candidates), device=self.device)
        self.words = None if words is None else words.to(self.device)

    def new_cache(self, num_rows: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.transformer.config)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self.cache.batch_select_indices(rows)

    def nats(
        self, rows: Int[Tensor, " rows"], candidates: Int[Tensor, " rows"], start: int, first: int, end: int
    ) -> Float[Tensor, " rows"]:
        tokens = self.token_ids[rows, : self.offsets[end]]
        words = None if self.words is None else self.words.rows(candidates)
        # every place predicts the token behind it: what a stage needs ends one token before its own last
        inputs = next_token_inputs(self.layout, self.labels[candidates], tokens[:, :-1], words)
        places = {} if words is None else words.places(tokens.shape[1])
        if self.cache is not None:
            seen = self.cache.get_seq_length()
            inputs = inputs[:, seen:]
            if places:
                places["position_ids"] = places["position_ids"][:, seen:]
        length = tokens.shape[1] - self.offsets[first]
        output = self.transformer(
            input_ids=inputs,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=length,
            **places,
        )
        logits = output.logits[..., : self.layout.codebook_size].float()
        return -next_token_loss(logits, tokens[:, self.offsets[first] :]).sum(dim=1)
