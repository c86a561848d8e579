"""Which class or prompt an image is most probably of: Bayes' rule over exact likelihoods, for models of both families.

Images are read in stages, coarse to fine (scales, or some groups of tokens), under every candidate. Candidates that are
hopeless after the first stages are not looked at any further. Source: Li et al., "Your Diffusion Model is Secretly a
Zero-Shot Classifier", which does it with noise levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.nn.draws import CLASSIFY, stream
from isthmus.pipelines.prompts import Asked

DEFAULT_VIEW_NOISE = 0.1


@dataclass
class CandidateScores:
    """How probable the candidate classes or prompts make images.

    Attributes:
        nats: log p(tokens | candidate) of the stages that were looked at; a mean over the views.
        stages: how many stages these are; fewer of a candidate that was dropped.
        below_best: nats below the best candidate, both at the last stage at which this one was looked at.
        tokens: tokens that ran through the network for this image, all candidates and views together.
    """

    nats: Float[Tensor, "b candidates"]
    stages: Int[Tensor, "b candidates"]
    below_best: Float[Tensor, "b candidates"]
    tokens: Int[Tensor, " b"]

    @classmethod
    def joined(cls, parts: Sequence["CandidateScores"]) -> "CandidateScores":
        """All images together, on the CPU."""
        names = ("nats", "stages", "below_best", "tokens")
        return cls(*(torch.cat([getattr(part, name).cpu() for part in parts]) for name in names))

    @property
    def order(self) -> Int[Tensor, "b candidates"]:
        """Columns of the candidates, the most probable first: those looked at longest, and of these the nearest to the
        best. How far a dropped one lay below the best says nothing beside one whose distance went on growing.
        """
        near = self.below_best.sort(dim=1, stable=True).indices
        longest = self.stages.gather(1, near).sort(dim=1, descending=True, stable=True).indices
        return near.gather(1, longest)

    @property
    def probabilities(self) -> Float[Tensor, "b candidates"]:
        """Posterior under equal priors; exact without pruning.

        A dropped candidate counts as no nearer to the best than those before it in `order`: what it gets is an upper
        bound as far as the stages seen can tell.
        """
        order = self.order
        below = self.below_best.double().gather(1, order).cummax(dim=1).values
        return torch.zeros_like(below).scatter(1, order, (-below).softmax(dim=1)).float()


@dataclass
class Candidates:
    """What images are sorted by: classes, or prompts.

    Attributes:
        asked: each as what an image is asked to be.
        ids: class ids, or numbers of prompts.
        names: of classes, or the prompts.
    """

    asked: Asked
    ids: list[int]
    names: list[str]


@dataclass
class ClassificationOutput:
    """What `classify` returns.

    Attributes:
        class_labels: (b, top_k), class ids, the most probable first; numbers of prompts, where those are chosen from.
        names: the same as names, or as prompts.
        probabilities: (b, top_k), posterior among the classes or prompts to choose from, in [0, 1].
        candidates: class ids (numbers of prompts) that were to choose from, the columns of `scores`.
        scores: log-likelihoods of every candidate, and what they cost.
    """

    class_labels: Int[Tensor, "b top_k"]
    names: list[list[str]]
    probabilities: Float[Tensor, "b top_k"]
    candidates: list[int]
    scores: CandidateScores

    @classmethod
    def of(cls, scores: CandidateScores, candidates: Candidates, top_k: int) -> "ClassificationOutput":
        """The best `top_k` of all candidates."""
        best = scores.order[:, :top_k]
        names = [[candidates.names[one] for one in row] for row in best.tolist()]
        labels = torch.tensor(candidates.ids)[best]
        return cls(labels, names, scores.probabilities.gather(1, best), candidates.ids, scores)


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


class Pairs(ABC):
    """Reads images under candidates, stage by stage, in passes of bounded size. A family says how a pass is made.

    A model that looks at earlier stages reads a stage after all of them. Where the whole sequences of all pairs fit
    into one pass, their keys are kept from stage to stage; until then every pass reads the earlier stages, few tokens,
    once more.

    Args:
        lengths: tokens of every stage.
        num_images: images, each with `num_views` rows of tokens that lie next to each other.
        num_candidates: what each of them is read under.
        num_views: rows of an image, whose log-likelihoods are averaged.
        tokens_at_once: bounds the memory: tokens that one pass reads and whose keys are held; None is no bound.
        row_tokens: tokens that weigh as much as what a row has beside its own.
        looks_back: whether a stage is read after all earlier ones, or alone.
        device: where the numbers of images and candidates are.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        num_images: int,
        num_candidates: int,
        num_views: int,
        tokens_at_once: int | None,
        row_tokens: int,
        looks_back: bool,
        device: torch.device,
    ):
        self.lengths, self.offsets = tuple(lengths), (0, *accumulate(lengths))
        self.num_images, self.num_candidates, self.num_views = num_images, num_candidates, num_views
        self.tokens_at_once, self.row_tokens, self.looks_back = tokens_at_once, row_tokens, looks_back
        self.device = device
        self.cache: Any = None  # of the pairs of the last call, where they fitted
        self.cached_stages = 0

    @abstractmethod
    def new_cache(self, num_rows: int) -> Any:
        """An empty cache for whole sequences."""

    @abstractmethod
    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Forget the keys of all other rows in `cache`."""

    @abstractmethod
    def nats(
        self, rows: Int[Tensor, " rows"], candidates: Int[Tensor, " rows"], start: int, first: int, end: int
    ) -> Float[Tensor, " rows"]:
        """Log-likelihood, fp32, of stages first..end - 1 of rows of tokens, each under a candidate.

        Stages start..end - 1 are read; those before lie in `cache`, where there is one, which is extended.
        """

    def read(
        self, image: Int[Tensor, " pairs"], candidate: Int[Tensor, " pairs"], first: int, end: int
    ) -> tuple[Float[Tensor, " pairs"], int]:
        """Nats of the stages first..end - 1, a mean over the views, and the tokens that were read per pair."""
        at_once = len(image)
        if self.looks_back and self._fitting(self.offsets[-1]) >= len(image):
            if self.cache is None:
                self.cache = self.new_cache(len(image) * self.num_views)
        else:
            at_once = self._fitting(self.offsets[end] if self.looks_back else self.lengths[end - 1])
        start = self.cached_stages if self.looks_back else first
        parts = zip(image.split(at_once), candidate.split(at_once), strict=True)
        gained = [self._pass(*pairs, start, first, end) for pairs in parts]
        self.cached_stages = end if self.cache is not None else 0
        return torch.cat(gained), self.num_views * (self.offsets[end] - self.offsets[start])

    def keep(self, going_on: Bool[Tensor, " pairs"]) -> None:
        """Forget the keys of the pairs that are dropped."""
        if self.cache is not None and not bool(going_on.all()):
            self.keep_rows(going_on.repeat_interleave(self.num_views).nonzero().squeeze(1))

    def _fitting(self, tokens: int) -> int:
        """How many pairs of so many tokens each are read at once, at least one."""
        if self.tokens_at_once is None:
            return self.num_images * self.num_candidates
        return max(1, self.tokens_at_once // (self.num_views * (tokens + self.row_tokens)))

    def _pass(
        self, image: Int[Tensor, " some"], candidate: Int[Tensor, " some"], start: int, first: int, end: int
    ) -> Float[Tensor, " some"]:
        views = torch.arange(self.num_views, device=image.device)
        rows = (image.unsqueeze(1) * self.num_views + views).flatten()
        gained = self.nats(rows, candidate.repeat_interleave(self.num_views), start, first, end)
        return gained.view(-1, self.num_views).mean(dim=1)


@torch.no_grad()
def score_pairs(pairs: Pairs, *, keep: int = 1, margin_nats: float | None = None) -> CandidateScores:
    """Log-likelihoods of images under every candidate, stage by stage, dropping some on the way.

    Args:
        keep: at least so many candidates per image go on to the last stage. With 1, an image is decided as soon as one
            is left, and costs nothing more.
        margin_nats: a candidate further below the best than this is dropped; None drops none.
    """
    num_stages, shape = len(pairs.lengths), (pairs.num_images, pairs.num_candidates)
    nats = torch.zeros(shape, device=pairs.device, dtype=torch.float32)
    below, stages = torch.zeros_like(nats), torch.zeros_like(nats, dtype=torch.long)
    alive = torch.ones_like(nats, dtype=torch.bool)
    tokens = torch.zeros_like(stages[:, 0])
    # where nothing is dropped nothing is decided between stages
    ends = range(1, num_stages + 1) if margin_nats is not None else (num_stages,)
    for first, end in pairwise((0, *ends)):
        image, candidate = alive.nonzero(as_tuple=True)
        if not len(image):
            break
        gained, spent = pairs.read(image, candidate, first, end)
        nats[image, candidate] += gained
        stages[image, candidate] = end
        tokens += alive.sum(dim=1) * spent
        best = nats.masked_fill(~alive, float("-inf")).amax(dim=1, keepdim=True)
        below = torch.where(alive, best - nats, below)
        if margin_nats is None or end == num_stages:
            break
        going_on = surviving(nats, alive, keep=keep, margin_nats=margin_nats)
        if keep == 1:
            going_on = going_on & (going_on.sum(dim=1, keepdim=True) > 1)  # the last one has won
        pairs.keep(going_on[image, candidate])
        alive = going_on
    return CandidateScores(nats, stages, below, tokens)


def perturbed_views(
    latents: Float[Tensor, "b ..."], image_seeds: Sequence[tuple[int, int]], *, num_views: int, noise: float
) -> Float[Tensor, "rows ..."]:
    """The latents of every image, each followed by `num_views` - 1 copies with Gaussian noise.

    `noise` is a share of the standard deviation of those of the image itself; the numbers follow from (seed, image
    index, view).
    """
    views = []
    for one, (seed, index) in zip(latents.float(), image_seeds, strict=True):
        views.append(one)
        for view in range(1, num_views):
            drawn = torch.from_numpy(stream(seed, CLASSIFY, index, view).standard_normal(tuple(one.shape))).float()
            views.append(one + noise * one.std() * drawn.to(one.device))
    return torch.stack(views)


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
