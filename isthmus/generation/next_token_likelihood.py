"""The exact probability that a next-token prior gives to the tokens of an image.

The chain rule over the sequence is exact: log p(tokens | class) is the sum of log p(token p | class, tokens before p).
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.models.next_token_prior import TokenLayout, next_token_logits, next_token_loss

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@torch.no_grad()
def log_likelihood(
    transformer: "LlamaForCausalLM",
    layout: TokenLayout,
    token_ids: Int[Tensor, "b l"],
    class_labels: Int[Tensor, " labels"],
) -> Float[Tensor, "b l"]:
    """Nats of every token, log p(token | class, tokens before it); a row's sum is log p of its tokens together.

    Args:
        transformer: the prior.
        layout: of its vocabulary.
        token_ids: (b, l), 0..codebook_size - 1, from the first token of the image on; l may be less than all.
        class_labels: one per row, 0..num_classes; num_classes is the null label.

    Raises:
        UserError: tokens or labels are out of range or do not match in number, or there are too many tokens.
    """
    _check(layout, token_ids, class_labels)
    token_ids, class_labels = token_ids.to(transformer.device), class_labels.to(transformer.device)
    logits = next_token_logits(transformer, layout, class_labels, token_ids[:, :-1])
    return -next_token_loss(logits, token_ids)


def _check(layout: TokenLayout, token_ids: Int[Tensor, "b l"], class_labels: Int[Tensor, " labels"]) -> None:
    rows, length = token_ids.shape
    if not 1 <= length <= layout.num_tokens or len(class_labels) != rows or not rows:
        raise UserError(
            f"a likelihood needs 1..{layout.num_tokens} tokens and a class label per image, got {rows} row(s) of "
            f"{length} token(s) and {len(class_labels)} label(s). Pass the tokens of whole images."
        )
    for name, values, largest in (
        ("token ids", token_ids, layout.codebook_size - 1),
        ("class labels", class_labels, layout.num_classes),
    ):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > largest:
            raise UserError(f"{name} must be 0..{largest}, got {low}..{high}. Pass those of this model.")
