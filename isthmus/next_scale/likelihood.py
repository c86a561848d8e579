"""The exact probability that a next-scale model gives to a token pyramid, and classification by it.

Source: Kumar et al., "Scale-Wise VAR is Secretly Discrete Diffusion" (the forward process is deterministic, so every KL
of the bound is a cross-entropy); spec of SRDD, 1, "The law". Classification is Bayes with equal priors over unguided
log-likelihoods, as diffusion classifiers do it with noise levels (Li et al., "Your Diffusion Model is Secretly a
Zero-Shot Classifier"); classes that are hopeless after the coarse scales are not looked at any further.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import ScaleSchedule
from isthmus.next_scale.sampling import shared_schedule
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.attention import KeyValueCache
from isthmus.nn.draws import CLASSIFY, stream
from isthmus.nn.shapes import LatentMap, ScaleTokens, TokenPyramid
from isthmus.text.encoders import TextFeatures

DEFAULT_VIEW_NOISE = 0.1


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


@dataclass
class ClassScores:
    """How probable the candidate classes make images.

    Attributes:
        nats: log p(tokens | class) of the scales that were looked at; a mean over the views.
        scales: how many scales these are; fewer of a class that was dropped.
        below_best: nats below the best class, both at the last scale at which the class was looked at.
        tokens: tokens that ran through the network for this image, all classes and views together.
    """

    nats: Float[Tensor, "b candidates"]
    scales: Int[Tensor, "b candidates"]
    below_best: Float[Tensor, "b candidates"]
    tokens: Int[Tensor, " b"]

    @classmethod
    def joined(cls, parts: Sequence["ClassScores"]) -> "ClassScores":
        """All images together, on the CPU."""
        names = ("nats", "scales", "below_best", "tokens")
        return cls(*(torch.cat([getattr(part, name).cpu() for part in parts]) for name in names))

    @property
    def order(self) -> Int[Tensor, "b candidates"]:
        """Columns of the candidates, the most probable first: those looked at longest, and of these the nearest to the
        best. How far a dropped class lay below the best says nothing beside one whose distance went on growing.
        """
        near = self.below_best.sort(dim=1, stable=True).indices
        longest = self.scales.gather(1, near).sort(dim=1, descending=True, stable=True).indices
        return near.gather(1, longest)

    @property
    def probabilities(self) -> Float[Tensor, "b candidates"]:
        """Posterior under equal priors; exact without pruning.

        A dropped class counts as no nearer to the best than those before it in `order`: what it gets is an upper bound
        as far as the scales seen can tell.
        """
        order = self.order
        below = self.below_best.double().gather(1, order).cummax(dim=1).values
        return torch.zeros_like(below).scatter(1, order, (-below).softmax(dim=1)).float()


def surviving(
    nats: Float[Tensor, "b candidates"], alive: Bool[Tensor, "b candidates"], *, keep: int, margin_nats: float
) -> Bool[Tensor, "b candidates"]:
    """Candidates that go on: those within `margin_nats` of the best, and at least the best `keep` of those alive.

    >>> nats = torch.tensor([[-1.0, -2.0, -9.0]])
    >>> surviving(nats, torch.ones(1, 3, dtype=torch.bool), keep=1, margin_nats=3.0).tolist()
    [[True, True, False]]
    """
    scores = nats.masked_fill(~alive, float("-inf"))
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    best = scores.amax(dim=1, keepdim=True)
    return alive & ((scores >= best - margin_nats) | (rank < keep))


@torch.no_grad()
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
) -> ClassScores:
    """Log-likelihoods of images under every candidate class or text, scale by scale, dropping some on the way.

    Args:
        token_ids: one (b * num_views, s_k * s_k) per scale; the views of an image lie next to each other.
        candidates: class ids.
        keep: at least so many classes per image go on to the last scale. With 1, an image is decided as soon as one
            class is left, and costs nothing more.
        margin_nats: a class further below the best than this is dropped; None drops none.
        num_views: token pyramids per image, whose log-likelihoods are averaged.
        tokens_at_once: bounds the memory: tokens that one pass reads and whose keys are held; None is no bound. The
            answers do not depend on it.
        texts: one for each of `candidates`, where the model reads text.
    """
    num_scales = transformer.schedule.num_scales
    pairs = _Pairs(image_tokenizer, transformer, token_ids, candidates, num_views, tokens_at_once, texts)
    nats = torch.zeros(len(token_ids[0]) // num_views, len(candidates), device=transformer.device, dtype=torch.float32)
    below, scales = torch.zeros_like(nats), torch.zeros_like(nats, dtype=torch.long)
    alive = torch.ones_like(nats, dtype=torch.bool)
    tokens = torch.zeros_like(scales[:, 0])
    # where nothing is dropped nothing is decided between scales
    ends = range(1, num_scales + 1) if margin_nats is not None else (num_scales,)
    for first, end in pairwise((0, *ends)):
        image, candidate = alive.nonzero(as_tuple=True)
        if not len(image):
            break
        gained, spent = pairs.read(image, candidate, first, end)
        nats[image, candidate] += gained
        scales[image, candidate] = end
        tokens += alive.sum(dim=1) * spent
        best = nats.masked_fill(~alive, float("-inf")).amax(dim=1, keepdim=True)
        below = torch.where(alive, best - nats, below)
        if margin_nats is None or end == num_scales:
            break
        going_on = surviving(nats, alive, keep=keep, margin_nats=margin_nats)
        if keep == 1:
            going_on = going_on & (going_on.sum(dim=1, keepdim=True) > 1)  # the last one has won
        pairs.keep(going_on[image, candidate])
        alive = going_on
    return ClassScores(nats, scales, below, tokens)


# a row's modulations, 6 vectors per block, weigh as much as the keys and values of so many tokens
_MODULATION_TOKENS = 3


class _Pairs:
    """Reads images under candidate classes, in passes of bounded size.

    A causal model reads a scale after all earlier ones. Where the whole pyramids of all pairs fit into one pass, their
    keys are kept from scale to scale; until then every pass reads the earlier scales, few tokens, once more.
    """

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
        self.transformer, self.num_views, self.tokens_at_once = transformer, num_views, tokens_at_once
        self.lengths, self.offsets = transformer.schedule.lengths, transformer.schedule.offsets
        self.token_ids, self.inputs = _by_scale(image_tokenizer, transformer, token_ids)
        labels = torch.tensor(list(candidates), device=transformer.device)
        self.conditioning = transformer.condition(labels, texts)
        # of every word a row has a key and a value too
        self.row_tokens = _MODULATION_TOKENS + (0 if texts is None else texts.mask.shape[1])
        self.cache: KeyValueCache | None = None  # of the pairs of the last call, where they fitted
        self.cached_scales = 0

    def read(
        self, image: Int[Tensor, " pairs"], candidate: Int[Tensor, " pairs"], first: int, end: int
    ) -> tuple[Float[Tensor, " pairs"], int]:
        """Nats of the scales first..end - 1, a mean over the views, and the tokens that were read per pair."""
        markov = self.transformer.is_markov
        at_once = len(image)
        if not markov and self._fitting(self.offsets[-1]) >= len(image):
            if self.cache is None:
                self.cache = self.transformer.new_cache(len(image) * self.num_views)
        else:
            at_once = self._fitting(self.lengths[end - 1] if markov else self.offsets[end])
        start = first if markov else self.cached_scales
        parts = zip(image.split(at_once), candidate.split(at_once), strict=True)
        gained = [self._pass(images, candidates, start, first, end) for images, candidates in parts]
        self.cached_scales = end if self.cache is not None else 0
        return torch.cat(gained), self.num_views * (self.offsets[end] - self.offsets[start])

    def keep(self, going_on: Bool[Tensor, " pairs"]) -> None:
        """Forget the keys of the pairs that are dropped."""
        if self.cache is not None and not bool(going_on.all()):
            self.cache.keep_rows(going_on.repeat_interleave(self.num_views).nonzero().squeeze(1))

    def _fitting(self, tokens: int) -> int:
        """How many pairs of so many tokens each are read at once, at least one."""
        if self.tokens_at_once is None:
            return len(self.conditioning.start) * len(self.token_ids[0])
        return max(1, self.tokens_at_once // (self.num_views * (tokens + self.row_tokens)))

    def _pass(
        self, image: Int[Tensor, " some"], candidate: Int[Tensor, " some"], start: int, first: int, end: int
    ) -> Float[Tensor, " some"]:
        views = torch.arange(self.num_views, device=image.device)
        rows = (image.unsqueeze(1) * self.num_views + views).flatten()
        modulation = self.conditioning.rows(candidate.repeat_interleave(self.num_views))
        cache = self.transformer.new_cache(len(rows), num_scales=end) if self.cache is None else self.cache
        gained = torch.zeros(len(rows), device=image.device, dtype=torch.float32)
        for scale in range(start, end):
            logits = self.transformer.forward_scale(scale, self.inputs[scale][rows], modulation, cache)
            if scale >= first:
                gained += _nats(logits, self.token_ids[scale][rows]).sum(dim=1)
        return gained.view(-1, self.num_views).mean(dim=1)


def perturbed_views(
    latents: LatentMap, image_seeds: Sequence[tuple[int, int]], *, num_views: int, noise: float
) -> Float[Tensor, "rows d grid grid"]:
    """Every latent map, each followed by `num_views` - 1 copies with Gaussian noise.

    `noise` is a share of the standard deviation of the map itself; the numbers follow from (seed, image index, view).
    """
    views = []
    for one, (seed, index) in zip(latents.float(), image_seeds, strict=True):
        views.append(one)
        for view in range(1, num_views):
            drawn = torch.from_numpy(stream(seed, CLASSIFY, index, view).standard_normal(tuple(one.shape))).float()
            views.append(one + noise * one.std() * drawn.to(one.device))
    return torch.stack(views)


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


def check_classification(
    *, top_k: int, num_candidates: int, num_views: int, noise: float | None, prune_nats: float | None
) -> None:
    """Raise UserError for numbers out of range, or where there is nothing to choose from or to perturb."""
    if num_candidates < 1:
        raise UserError("classification needs at least one class or prompt, got none. Pass class_labels or prompts.")
    if not 1 <= top_k <= num_candidates:
        raise UserError(f"top_k must lie in 1..{num_candidates} (the classes to choose from), got {top_k}.")
    if noise is not None and num_views == 1:
        raise UserError(f"view_noise perturbs views after the first, got {noise} with num_views=1. Ask for more views.")
    if num_views < 1 or not (noise is None or 0 <= noise <= 1):
        raise UserError(
            f"num_views must be at least 1 and view_noise lie in [0, 1] (a share of the latents' standard deviation), "
            f"got {num_views} and {noise}."
        )
    if prune_nats is not None and not prune_nats >= 0:
        raise UserError(f"prune_nats must not be negative (nats below the best class), got {prune_nats}. None is off.")
