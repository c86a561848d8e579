"""What a next-scale pipeline takes an image for, and which parts of it say so."""

from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.shapes import TokenPyramid
from isthmus.generation.classification import (
    ClassScores,
    check_classification,
    evidence_map,
    perturbed_views,
    score_classes,
    token_evidence,
)
from isthmus.pipelines.free_memory import free_bytes
from isthmus.pipelines.images import ImageInput
from isthmus.pipelines.labels import resolve_labels
from isthmus.pipelines.next_scale_likelihood import NextScaleLikelihood
from isthmus.pipelines.request import Labels, label_list
from isthmus.pipelines.seeds import image_seeds

DEFAULT_VIEW_NOISE = 0.1
_IMAGES_AT_ONCE = 8
_MOST_TOKENS = 2**16  # larger passes are no faster


@dataclass
class ClassificationOutput:
    """What `classify` returns.

    Attributes:
        class_labels: (b, top_k), class ids, the most probable first.
        names: the same as names.
        probabilities: (b, top_k), posterior among the classes to choose from, in [0, 1].
        candidates: class ids that were to choose from, the columns of `scores`.
        scores: log-likelihoods of every candidate, and what they cost.
    """

    class_labels: Int[Tensor, "b top_k"]
    names: list[list[str]]
    probabilities: Float[Tensor, "b top_k"]
    candidates: list[int]
    scores: ClassScores


class NextScaleClassification(NextScaleLikelihood):
    """Generative classification with the likelihood of a next-scale pipeline."""

    def classify(
        self,
        images: ImageInput,
        class_labels: Labels = None,
        top_k: int = 1,
        *,
        prune_nats: float | int | None = 8.0,
        num_views: int = 1,
        view_noise: float | int | None = None,
        seed: SupportsIndex = 0,
        image_index: int = 0,
    ) -> ClassificationOutput:
        """The most probable classes of images, by Bayes' rule with equal priors over unguided log-likelihoods.

        Args:
            images: as for `encode`.
            class_labels: classes to choose from, names or indices; None is all of the model.
            top_k: how many classes to return; at least so many are looked at to the end.
            prune_nats: after every scale, a class further below the best than this is dropped; None drops none, and is
                exact.
            num_views: log-likelihoods are averaged over the image and `num_views` - 1 perturbed copies of its latents.
            view_noise: standard deviation of the perturbation, as a share of that of the latents, in [0, 1]; None is
                0.1. It needs more than one view.
            seed: of the perturbations; image i draws from (seed, image_index + i), whatever the batch.
            image_index: number of the first image.

        Raises:
            UserError: images or classes are not usable, there is no class, or a number is out of range.
        """
        candidates = self._candidates(class_labels)
        check_classification(
            top_k=top_k, num_candidates=len(candidates), num_views=num_views, noise=view_noise, prune_nats=prune_nats
        )
        noise = DEFAULT_VIEW_NOISE if view_noise is None else view_noise
        parts, first = [], image_index
        for latents in self._latents(images):
            seeds = image_seeds(len(latents), seed=seed, image_index=first)
            first += len(latents)
            for some, own in zip(latents.split(_IMAGES_AT_ONCE), _chunks(seeds), strict=True):
                views = perturbed_views(some, own, num_views=num_views, noise=noise)
                parts.append(
                    score_classes(
                        self.image_tokenizer, self.transformer, self._quantized(views), candidates, keep=top_k,
                        margin_nats=prune_nats, num_views=num_views, tokens_at_once=self._tokens_that_fit(),
                    )
                )  # fmt: skip
        scores = _joined(parts)
        best = scores.order[:, :top_k]
        ids = torch.tensor(candidates)[best]
        names = [[self.label_name(one) for one in row] for row in ids.tolist()]
        return ClassificationOutput(ids, names, scores.probabilities.gather(1, best), candidates, scores)

    def evidence(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: TokenPyramid | None = None,
    ) -> Float[Tensor, "b grid grid"]:
        """Where an image speaks for its class: nats of pointwise mutual information per cell of the latent grid.

        log p(token | class) - log p(token | no class), each token spread over its cell, all scales added. A map's sum
        is log p(image's tokens | class) - log p(image's tokens). `isthmus.pictures.heat_map` draws it
        over the central square of a picture, which is what is read of one.

        Args:
            images: the images, or
            class_labels: one class per image, or one for all.
            token_ids: what `encode` returns.

        Raises:
            UserError: images or labels are not usable, a label is None, or both or neither of images and tokens are
                given.
        """
        if any(label is None for label in label_list(class_labels)):
            raise UserError("evidence is evidence for a class, got None. Pass a class for every image.")
        by_token = self._by_parts(
            images, class_labels, token_ids,
            lambda part, labels: token_evidence(self.image_tokenizer, self.transformer, part, labels),
        )  # fmt: skip
        return evidence_map(by_token, self.schedule)

    def _candidates(self, class_labels: Labels) -> list[int]:
        if class_labels is None:
            return list(range(self.num_classes))
        given = label_list(class_labels)
        if any(label is None for label in given):
            raise UserError("classes to choose from are names or indices, got None. Leave it out.")
        ids = resolve_labels(given, class_names=self.class_names, num_classes=self.num_classes)
        if len(set(ids)) < len(ids):
            raise UserError(f"every class to choose from is named once, got {given}.")
        return ids

    def _tokens_that_fit(self) -> int:
        """Tokens whose keys, activations and logits fit into the memory that is free."""
        config, size = self.transformer.config, self.transformer.dtype.itemsize
        # keys and values twice: dropping rows copies those that stay
        block = config["width"] * (4 * config["num_layers"] + 10 + 2 * config["mlp_ratio"]) * size
        token = int(block + 4 * config["codebook_size"] * 4)
        return max(1, min(_MOST_TOKENS, free_bytes(self.device) // 2 // token))

    def _quantized(self, latents: Tensor) -> TokenPyramid:
        with torch.inference_mode():
            return self.image_tokenizer.requantize(latents, self.schedule)


def _chunks(seeds: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    return [seeds[i : i + _IMAGES_AT_ONCE] for i in range(0, len(seeds), _IMAGES_AT_ONCE)]


def _joined(parts: list[ClassScores]) -> ClassScores:
    """All images together, on the CPU, as tensors anybody may use."""
    names = ("nats", "scales", "below_best", "tokens")
    return ClassScores(*(torch.cat([getattr(part, name).cpu() for part in parts]).clone() for name in names))
