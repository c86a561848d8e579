"""How well a diffusion tokenizer does on images it has not seen, and whether its decoder listens to the tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from isthmus.data.views import Sample
from isthmus.functional.psnr import psnr
from isthmus.functional.shapes import Images
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.pictures import spread
from isthmus.training.usage import CodebookUsage, code_counts

_BATCH = 32

Decode = Callable[[Float[Tensor, "b n d"], Sequence[int]], Images]
"""Codes of all tokens and the numbers of the images, which decide about their noise, to images in [-1, 1]."""


@dataclass(frozen=True)
class DiffusionTokenizerScores:
    """Measurements on held-out images.

    Attributes:
        num_images: images measured.
        psnr: mean over images, dB.
        psnr_shuffled: the same of decodes from another image's codes, under the same noise.
        usage: share of the codebook that any group uses; 1 where nothing was quantised.
        perplexity_by_group: exp(entropy) of the codes of each group; empty where nothing was quantised.
    """

    num_images: int
    psnr: float
    psnr_shuffled: float
    usage: float
    perplexity_by_group: list[float]

    @property
    def gap(self) -> float:
        """What the right codes are worth, dB: near 0 where the decoder ignores them, however low the flow loss is.

        0 for a single image, which has no other's codes to be compared with.
        """
        return self.psnr - self.psnr_shuffled

    def as_floats(self) -> dict[str, float]:
        """Flat names for a log line."""
        values = {"psnr": self.psnr, "psnr_shuffled": self.psnr_shuffled, "gap": self.gap, "usage": self.usage}
        values |= {f"perplexity_group{k}": value for k, value in enumerate(self.perplexity_by_group)}
        return {f"val/{name}": value for name, value in values.items()}


@torch.no_grad()
def diffusion_tokenizer_scores(
    tokenizer: DiffusionTokenizer, decode: Decode, images: "Dataset[Sample]", *, limit: int, quantize: bool = True
) -> DiffusionTokenizerScores:
    """Measure a tokenizer and its decoder on `limit` images of a data set, evenly spread over it.

    Every image is decoded twice: from its own codes, and from those of the image half the set away, which is of another
    class where the set is sorted. Without `quantize` the latents take the place of codes, as in training before there
    is a codebook.
    """
    chosen = spread(len(images), limit)  # pyright: ignore[reportArgumentType]  map-style data sets have a length
    batches = [chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH)]

    def pixels(numbers: Sequence[int]) -> Images:
        return torch.stack([torch.as_tensor(images[i]["image"]) for i in numbers]).to(tokenizer.device)

    read = [latents_or_codes(tokenizer, pixels(numbers), quantize=quantize) for numbers in batches]
    codes, ids = torch.cat([codes for codes, _ in read]), [ids.cpu() for _, ids in read if ids is not None]
    others = codes.roll(len(chosen) // 2, dims=0)
    own, shuffled = [], []
    for numbers, right, wrong in zip(batches, codes.split(_BATCH), others.split(_BATCH), strict=True):
        targets = pixels(numbers)
        own.append(psnr(decode(right, numbers), targets).cpu())
        shuffled.append(psnr(decode(wrong, numbers), targets).cpu())
    usage, perplexity = _usage(tokenizer, ids) if ids else (1.0, [])
    return DiffusionTokenizerScores(
        num_images=len(chosen),
        psnr=float(torch.cat(own).mean()),
        psnr_shuffled=float(torch.cat(shuffled).mean()),
        usage=usage,
        perplexity_by_group=perplexity,
    )


def latents_or_codes(
    tokenizer: DiffusionTokenizer, images: Images, *, quantize: bool
) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n"] | None]:
    """What the causal stack reads, and the token ids behind it where there are any."""
    if not quantize or tokenizer.codebook is None:
        return tokenizer.latents(images), None
    encoded = tokenizer.encode(images)
    return encoded.quantized, encoded.token_ids


def group_counts(tokenizer: DiffusionTokenizer, token_ids: Tensor) -> Float[Tensor, "groups k"]:
    """How often each code was chosen in each group of tokens."""
    return code_counts(list(token_ids.split(tokenizer.tokens_per_group, dim=1)), tokenizer.config["codebook_size"])


def group_usage(tokenizer: DiffusionTokenizer, *, decay: float = 0.99) -> CodebookUsage:
    """Moving averages of those counts, one row per group."""
    return CodebookUsage(
        tokenizer.config["num_groups"], tokenizer.config["codebook_size"], decay=decay, device=tokenizer.device
    )


def _usage(tokenizer: DiffusionTokenizer, token_ids: Sequence[Tensor]) -> tuple[float, list[float]]:
    counts = group_counts(tokenizer, torch.cat(list(token_ids)))
    usage = group_usage(tokenizer, decay=0.0)
    usage.update(counts)
    return float((counts.sum(dim=0) > 0).float().mean()), usage.perplexity().tolist()
