"""The exact probability that a next-scale model gives to a token pyramid, and classification by it.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion" (the forward process is deterministic, so every KL
of the bound is a cross-entropy); spec of SRDD, 1, "The law". How classes are chosen by it:
`isthmus.pipelines.classification`, a stage being a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import ScaleSchedule
from isthmus.next_scale.sampling import shared_schedule
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.attention import KeyValueCache
from isthmus.nn.shapes import LatentMap, ScaleTokens, TokenPyramid
from isthmus.pipelines.classification import CandidateScores, Pairs, score_pairs
from isthmus.text.encoders import TextFeatures


@dataclass
class DiffusionBound:
    """The terms of the negative evidence lower bound, in nats per image.

    State x_n is the tokens of the first n scales, x_K the image, x_0 nothing at all. The forward process drops scales,
    so its posterior q(x_{n+1} | x_n, image) is a point mass, and its KL to the model is -log p(x_{n+1} | x_n): `steps`
    up to x_{K-1}, `reconstruction` for x_K. `prior` is the KL of x_0 to where generation starts, x_0: 0.
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
    text: TextFeatures | None = None,
) -> Float[Tensor, "b l"]:
    """Nats of every token, log p(token | class, coarser scales), in one teacher-forced pass, unguided and unfiltered.

    Tokens of one scale are independent given the coarser ones, so a row's sum is log p(pyramid | class). Labels are
    0..num_classes, the last being the null label; `text` has a prompt for each, where the model reads them; tokens are
    the caller's to check (`check_token_ids`).
    """
    token_ids, inputs = _by_scale(image_tokenizer, transformer, token_ids)
    logits = transformer(class_labels.to(transformer.device), torch.cat(inputs, dim=1), text=text).logits
    return _nats(logits, torch.cat(token_ids, dim=1))


@torch.no_grad()
def diffusion_bound(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " labels"],
    text: TextFeatures | None = None,
) -> DiffusionBound:
    """The bound by the reverse process, a forward per scale; by the paper's law the sum of `token_log_likelihood`.

    Both read the same teacher-forced inputs.
    """
    token_ids, inputs = _by_scale(image_tokenizer, transformer, token_ids)
    conditioning = transformer.condition(class_labels.to(transformer.device), text)
    cache, costs = transformer.new_cache(len(class_labels)), []
    for scale, (ids, rows) in enumerate(zip(token_ids, inputs, strict=True)):
        costs.append(-_nats(transformer.forward_scale(scale, rows, conditioning, cache), ids).sum(dim=1))
    by_step = torch.stack(costs, dim=1)
    return DiffusionBound(torch.zeros_like(by_step[:, 0]), by_step[:, :-1], by_step[:, -1])


def _by_scale(
    image_tokenizer: MultiScaleVQVAE, transformer: NextScaleTransformer, token_ids: TokenPyramid
) -> tuple[TokenPyramid, list[Float[Tensor, "b _ d"]]]:
    """Token ids, and what the transformer reads at every scale, on its device; UserError where the two do not fit."""
    schedule = shared_schedule(image_tokenizer, transformer)
    token_ids = [ids.long().to(transformer.device) for ids in token_ids]
    inputs = image_tokenizer.scale_inputs(token_ids, schedule).to(transformer.dtype)
    return token_ids, list(inputs.split([0, *schedule.lengths[1:]], dim=1))


@torch.no_grad()
def signal_to_noise(
    image_tokenizer: MultiScaleVQVAE, latents: LatentMap, schedule: ScaleSchedule | None = None
) -> Float[Tensor, "b scales"]:
    """How much of the latents f a state holds: ||f||^2 / ||f - Fhat_n||^2 in dB after every scale n."""
    latents = latents.float()
    states = image_tokenizer.token_scales(image_tokenizer.requantize(latents, schedule), schedule)
    noise = torch.stack([(latents - state.features).square().sum(dim=(1, 2, 3)) for state in states], dim=1)
    return 10 * torch.log10(latents.square().sum(dim=(1, 2, 3)).unsqueeze(1) / noise)


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


def _nats(logits: Float[Tensor, "b l v"], token_ids: ScaleTokens) -> Float[Tensor, "b l"]:
    # at least fp32, whatever the type of the weights
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits.transpose(1, 2), token_ids, reduction="none")


def score_classes(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    candidates: Sequence[int],
    *,
    keep: int = 1,
    margin_nats: float | None = None,
    num_views: int = 1,
    tokens_at_once: int | None = None,
    texts: TextFeatures | None = None,
) -> CandidateScores:
    """Log-likelihoods of images under every candidate class or text, scale by scale; see `score_pairs`.

    Args:
        token_ids: one (b * num_views, s_k * s_k) per scale; the views of an image lie next to each other.
        candidates: class ids.
        num_views: token pyramids per image, whose log-likelihoods are averaged.
        tokens_at_once: bounds the memory: tokens that one pass reads and whose keys are held; None is no bound. The
            answers do not depend on it.
        texts: one for each of `candidates`, where the model reads text.
    """
    pairs = _Pairs(image_tokenizer, transformer, token_ids, candidates, num_views, tokens_at_once, texts)
    return score_pairs(pairs, keep=keep, margin_nats=margin_nats)


# a row's modulations, 6 vectors per block, weigh as much as the keys and values of so many tokens
_MODULATION_TOKENS = 3


class _Pairs(Pairs):
    """Pyramids under classes or texts, of which everything but the pyramids is computed once."""

    cache: KeyValueCache | None

    def __init__(
        self,
        image_tokenizer: MultiScaleVQVAE,
        transformer: NextScaleTransformer,
        token_ids: TokenPyramid,
        candidates: Sequence[int],
        num_views: int,
        tokens_at_once: int | None,
        texts: TextFeatures | None,
    ):
        super().__init__(
            transformer.schedule.lengths,
            num_images=len(token_ids[0]) // num_views,
            num_candidates=len(candidates),
            num_views=num_views,
            tokens_at_once=tokens_at_once,
            # of every word a row has a key and a value too
            row_tokens=_MODULATION_TOKENS + (0 if texts is None else texts.mask.shape[1]),
            looks_back=not transformer.is_markov,
            device=transformer.device,
        )
        self.transformer = transformer
        self.token_ids, self.inputs = _by_scale(image_tokenizer, transformer, token_ids)
        with torch.no_grad():
            labels = torch.tensor(list(candidates), device=transformer.device)
            self.conditioning = transformer.condition(labels, texts)

    def new_cache(self, num_rows: int) -> KeyValueCache | None:
        return self.transformer.new_cache(num_rows)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        assert self.cache is not None, "there are rows to keep"
        self.cache.keep_rows(rows)

    def nats(
        self, rows: Int[Tensor, " rows"], candidates: Int[Tensor, " rows"], start: int, first: int, end: int
    ) -> Float[Tensor, " rows"]:
        conditioning = self.conditioning.rows(candidates)
        cache = self.transformer.new_cache(len(rows), num_scales=end) if self.cache is None else self.cache
        gained = torch.zeros(len(rows), device=rows.device, dtype=torch.float32)
        for scale in range(start, end):
            logits = self.transformer.forward_scale(scale, self.inputs[scale][rows], conditioning, cache)
            if scale >= first:
                gained += _nats(logits, self.token_ids[scale][rows]).sum(dim=1)
        return gained


def token_evidence(
    image_tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    token_ids: TokenPyramid,
    class_labels: Int[Tensor, " labels"],
    text: TextFeatures | None = None,
    null_text: TextFeatures | None = None,
) -> Float[Tensor, "b l"]:
    """Pointwise mutual information of token and condition, in nats: log p(token | class, text) - log p(token | null).

    A model that reads text has `text` with a prompt for each label, and `null_text` with the empty one.
    """
    null = torch.full_like(class_labels, transformer.null_class_id)
    if null_text is not None:
        null_text = null_text.rows(null.new_zeros(len(null)))
    asked = token_log_likelihood(image_tokenizer, transformer, token_ids, class_labels, text)
    return asked - token_log_likelihood(image_tokenizer, transformer, token_ids, null, null_text)


def evidence_map(evidence: Float[Tensor, "b l"], schedule: ScaleSchedule) -> Float[Tensor, "b grid grid"]:
    """Evidence of the tokens of all scales on one map: every token spread evenly over its cell, so sums stay.

    >>> evidence_map(torch.ones(1, 5), ScaleSchedule((1, 2), (0, 0)))
    tensor([[[1.2500, 1.2500],
             [1.2500, 1.2500]]])
    """
    total = evidence.new_zeros(len(evidence), schedule.grid, schedule.grid)
    for size, part in zip(schedule.sizes, evidence.split(list(schedule.lengths), dim=1), strict=True):
        share = _overlaps(size, schedule.grid).to(evidence)
        total = total + torch.einsum("bij,iy,jx->byx", part.unflatten(1, (size, size)), share, share)
    return total


def _overlaps(size: int, grid: int) -> Float[Tensor, "{size} {grid}"]:
    """Which part of each of `size` equal intervals lies in each of `grid` equal intervals; rows sum to 1."""
    # in units of 1 / (size * grid), of which every interval of the one has `grid`, and of the other `size`
    units = torch.eye(size, dtype=torch.float64, device="cpu").repeat_interleave(grid, dim=1)
    return units.view(size, grid, size).sum(dim=2) / grid
