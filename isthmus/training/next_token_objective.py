"""The objective of next-token priors: cross-entropy of every image token, given the class and the tokens before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from isthmus.models.next_token_prior import TokenLayout, next_token_inputs, next_token_loss
from isthmus.training.dropout import sample_dropout


@dataclass
class NextTokenLosses:
    """What one batch gave.

    Attributes:
        total: mean cross-entropy, nats per token: what is minimised.
        nats: (b, l), cross-entropy of every token.
        hits: (b, l), whether the likeliest code was the right one.
    """

    total: Float[Tensor, ""]
    nats: Float[Tensor, "b l"]
    hits: Bool[Tensor, "b l"]


class NextTokenObjective(nn.Module):
    """A Llama and its loss as one network for the optimizer, the averages and the processes.

    The head is applied to its first `codebook_size` rows only: the rows of class ids, which are zero, are never
    predicted, never get a gradient and stay zero.

    Args:
        transformer: the Llama.
        layout: of its vocabulary.
        embedding_dropout: share of the entries of embedded words that is zeroed in training mode.
    """

    def __init__(self, transformer: LlamaForCausalLM, layout: TokenLayout, *, embedding_dropout: float = 0.0):
        super().__init__()
        self.transformer, self.layout = transformer, layout
        self.embedding_dropout = embedding_dropout

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of each block in the backward pass."""
        # the newer of transformers' two names for it, where there is one
        newer = getattr(self.transformer, "activation_checkpointing_enable", None)
        (newer or self.transformer.gradient_checkpointing_enable)({"use_reentrant": False})

    def forward(
        self,
        class_labels: Int[Tensor, " b"],
        token_ids: Int[Tensor, "b l"],
        embedding_seeds: Sequence[int] | None = None,
    ) -> NextTokenLosses:
        """Losses of all tokens at once (teacher forcing).

        Args:
            class_labels: 0..num_classes, where num_classes is the null label.
            token_ids: all tokens of the images.
            embedding_seeds: one per image, for the dropout of the embeddings; None drops nothing.
        """
        inputs = next_token_inputs(self.layout, class_labels, token_ids[:, :-1])
        embedded = self.transformer.get_input_embeddings()(inputs)
        if embedding_seeds is not None and self.embedding_dropout and self.training:
            embedded = sample_dropout(embedded, self.embedding_dropout, embedding_seeds)
        hidden = self.transformer.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = F.linear(hidden, self.transformer.lm_head.weight[: self.layout.codebook_size]).float()
        nats = next_token_loss(logits, token_ids)
        return NextTokenLosses(nats.mean(), nats.detach(), logits.detach().argmax(dim=-1) == token_ids)


def nats_by_group(nats: Float[Tensor, "b l"], num_groups: int) -> Float[Tensor, " groups"]:
    """Mean over images and over the tokens of each group.

    >>> import torch
    >>> nats_by_group(torch.tensor([[1.0, 3.0, 5.0, 5.0]]), 2)
    tensor([2., 5.])
    """
    return nats.mean(dim=0).unflatten(0, (num_groups, -1)).mean(dim=1)
