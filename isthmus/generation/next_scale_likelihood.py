"""The exact probability that a next-scale model gives to a token pyramid, and the diffusion bound that equals it.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion" (the forward process is deterministic, so every
KL of the bound is a cross-entropy); spec of SRDD, 1, "The law".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.quantization import next_scale_input
from isthmus.functional.shapes import LatentMap, ScaleTokens, TokenPyramid
from isthmus.generation.next_scale import shared_schedule
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer


@dataclass
class DiffusionBound:
    """The terms of the negative evidence lower bound, in nats per image.

    State x_n is the tokens of the first n scales, x_K the image, x_0 nothing at all. The forward process drops scales,
    so its posterior q(x_{n+1} | x_n, image) is a point mass, and its KL to the model is -log p(x_{n+1} | x_n).

    Attributes:
        prior: (b,), KL of the last state of the forward process to where generation starts: both are x_0, so 0.
        steps: (b, K - 1), KL of every step from x_0 up to x_{K-1}.
        reconstruction: (b,), -log p(x_K | x_{K-1}).
    """

    prior: Float[Tensor, " b"]
    steps: Float[Tensor, "b steps"]
    reconstruction: Float[Tensor, " b"]

    @property
    def elbo(self) -> Float[Tensor, " b"]:
        """The bound on log p(tokens | class); it is tight."""
        return -(self.prior + self.steps.sum(dim=1) + self.reconstruction)


@torch.no_grad()
def token_log_likelihood(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " labels"],
) -> Float[Tensor, "b l"]:
    """Nats of every token, log p(token | class, coarser scales), in one teacher-forced pass.

    The model is unguided and unfiltered, at temperature 1. Tokens of one scale are independent given the coarser ones,
    so a row's sum is log p(pyramid | class), for both kinds of attention.

    Args:
        image_tokenizer: its codebook and phi make the inputs.
        transformer: the model in question.
        token_ids: one (b, s_k * s_k) per scale of the transformer.
        class_labels: (b,), 0..num_classes; num_classes is the null label.

    Raises:
        UserError: tokens or labels are out of range or do not match in number, or the models are strangers.
    """
    schedule = shared_schedule(image_tokenizer, transformer)
    token_ids, class_labels = _checked(transformer, schedule, token_ids, class_labels)
    inputs = image_tokenizer.scale_inputs(token_ids, schedule).to(transformer.dtype)
    return _nats(transformer(class_labels, inputs).logits, torch.cat(token_ids, dim=1))


@torch.no_grad()
def diffusion_bound(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " labels"],
) -> DiffusionBound:
    """The bound by running the reverse process on the states of the forward process, scale by scale.

    Arguments and errors are those of `token_log_likelihood`, whose sum it equals: the law of the paper.
    """
    schedule = shared_schedule(image_tokenizer, transformer)
    token_ids, class_labels = _checked(transformer, schedule, token_ids, class_labels)
    batch, dim = len(class_labels), image_tokenizer.codebook.embedding_dim
    conditioning, cache = transformer.condition(class_labels), transformer.new_cache(batch)
    shape = (batch, dim, schedule.grid, schedule.grid)
    features = torch.zeros(shape, device=transformer.device, dtype=torch.float32)
    costs = []
    for scale, ids in enumerate(token_ids):
        inputs = next_scale_input(features, schedule, scale) if scale else features.new_zeros(batch, 0, dim)
        logits = transformer.forward_scale(scale, inputs.to(transformer.dtype), conditioning, cache)
        costs.append(-_nats(logits, ids).sum(dim=1))
        features = image_tokenizer.add_codes(features, image_tokenizer.lookup(ids), scale, schedule)
    by_step = torch.stack(costs, dim=1)
    return DiffusionBound(torch.zeros_like(by_step[:, 0]), by_step[:, :-1], by_step[:, -1])


def bits_per_pixel(log_prob: Float[Tensor, " b"], image_size: int) -> Float[Tensor, " b"]:
    """Bits that the token pyramid costs, over the pixels of the image: what compressing its tokens would take.

    It is no likelihood of the pixels, which the tokens do not fix.

    >>> bits_per_pixel(torch.tensor([-math.log(2) * 64]), 8)
    tensor([1.])
    """
    return -log_prob / math.log(2) / image_size**2


@torch.no_grad()
def signal_to_noise(
    image_tokenizer: MultiScaleVQVAE, latents: LatentMap, schedule: ScaleSchedule | None = None
) -> Float[Tensor, "b scales"]:
    """How much of an image a state holds: ||f||^2 / ||f - Fhat_n||^2 in dB after every scale.

    `latents` f are those of `MultiScaleVQVAE.encode`. It rises with n as in a reversed diffusion.
    """
    latents, rows = latents.float(), []
    token_ids = image_tokenizer.requantize(latents, schedule)
    features = torch.zeros_like(latents)
    for scale, ids in enumerate(token_ids):
        features = image_tokenizer.add_codes(features, image_tokenizer.lookup(ids), scale, schedule)
        noise = (latents - features).square().flatten(1).sum(dim=1)
        rows.append(10 * torch.log10(latents.square().flatten(1).sum(dim=1) / noise))
    return torch.stack(rows, dim=1)


def check_token_ids(token_ids: Sequence[Tensor], lengths: Sequence[int], codebook_size: int) -> None:
    """Raise UserError unless `token_ids` holds one integer tensor (b, length) per length, of ids of known codes."""
    shapes = [tuple(ids.shape) for ids in token_ids]
    wanted = [(shapes[0][0] if shapes and shapes[0] else 0, length) for length in lengths]
    if shapes != wanted or not wanted[0][0]:
        raise UserError(
            f"token_ids must be a list with one tensor (b, length) per scale, of lengths {tuple(lengths)}, got shapes "
            f"{shapes}. Pass what `encode` returns."
        )
    if any(ids.is_floating_point() or ids.is_complex() for ids in token_ids):
        raise UserError(f"token_ids must be integers, got {[str(ids.dtype) for ids in token_ids]}.")
    low, high = min(int(ids.min()) for ids in token_ids), max(int(ids.max()) for ids in token_ids)
    if low < 0 or high >= codebook_size:
        raise UserError(f"token ids must be 0..{codebook_size - 1}, got {low}..{high}. Pass those of this model.")


def _checked(
    transformer: NextScaleTransformer,
    schedule: ScaleSchedule,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " labels"],
) -> tuple[list[Tensor], Tensor]:
    """Tokens and labels on the device of the model."""
    check_token_ids(token_ids, schedule.lengths, transformer.config["codebook_size"])
    if len(class_labels) != len(token_ids[0]):
        raise UserError(
            f"a likelihood needs one class label per image ({len(token_ids[0])}), got {len(class_labels)}. "
            "Pass one for each, or a single one."
        )
    low, high = int(class_labels.min()), int(class_labels.max())
    if low < 0 or high > transformer.null_class_id:
        raise UserError(f"class labels must be 0..{transformer.null_class_id}, got {low}..{high}.")
    return [ids.long().to(transformer.device) for ids in token_ids], class_labels.to(transformer.device)


def _nats(logits: Float[Tensor, "b l v"], token_ids: ScaleTokens) -> Float[Tensor, "b l"]:
    # at least fp32, whatever the type of the weights
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits.transpose(1, 2), token_ids, reduction="none")
