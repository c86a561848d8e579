"""The exact probability that a next-scale transformer gives to the tokens of an image.

The tokens of a scale are independent given the scales before it, so log p(tokens | class) is the sum over all tokens of
log p(token | class, coarser scales): one teacher-forced pass. A Markov transformer reads the sum of the coarser scales
instead of each of them, which changes what it knows and not the sum.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.shapes import TokenPyramid
from isthmus.generation.next_scale import shared_schedule
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer


@torch.no_grad()
def log_likelihood(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " labels"],
) -> Float[Tensor, "b l"]:
    """Nats of every token, coarse to fine: log p(token | class, coarser scales), from fp32 logits without guidance.

    Args:
        image_tokenizer: turns coarser tokens into what the transformer reads.
        transformer: the prior.
        token_ids: (b, s_k * s_k) for every scale of the transformer, 0..codebook_size - 1.
        class_labels: one per row, 0..num_classes; num_classes is the null label.

    Raises:
        UserError: tokens or labels are out of range or do not match in number, or a scale is missing.
    """
    schedule = shared_schedule(image_tokenizer, transformer)
    found = tuple(ids.shape[1] for ids in token_ids)
    if found != schedule.lengths:
        raise UserError(
            f"a likelihood needs the tokens of all scales, {schedule.lengths}, got {found}. Pass those of whole images."
        )
    device = transformer.device
    pyramid = [ids.to(device) for ids in token_ids]
    flat, labels = torch.cat(pyramid, dim=1), class_labels.to(device)
    _check(flat, labels, image_tokenizer.config["codebook_size"], transformer.null_class_id)
    inputs = image_tokenizer.scale_inputs(pyramid, schedule).to(transformer.dtype)
    logits = transformer(labels, inputs).logits.float()
    return -F.cross_entropy(logits.transpose(1, 2), flat, reduction="none")


def _check(token_ids: Int[Tensor, "b l"], class_labels: Int[Tensor, " labels"], codebook_size: int, null: int) -> None:
    if not len(token_ids) or len(class_labels) != len(token_ids):
        raise UserError(
            f"a likelihood needs a class label per image, got {len(token_ids)} row(s) of tokens and "
            f"{len(class_labels)} label(s)."
        )
    for name, values, largest in (("token ids", token_ids, codebook_size - 1), ("class labels", class_labels, null)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > largest:
            raise UserError(f"{name} must be 0..{largest}, got {low}..{high}. Pass those of this model.")
