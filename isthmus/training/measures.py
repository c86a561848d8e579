"""Numbers that training prints: PSNR, what each scale adds, and how the codebook is used on held-out images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from isthmus.data.views import Sample
from isthmus.functional.psnr import psnr
from isthmus.functional.shapes import Images
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.pictures import spread
from isthmus.training.usage import CodebookUsage, code_counts


@dataclass(frozen=True)
class TokenizerScores:
    """How well a tokenizer does on images it has not seen.

    Attributes:
        num_images: images measured.
        psnr: mean over images, dB.
        psnr_by_scale: of the reconstruction from scales 0..k, mean over at most 64 of them.
        usage: share of the codebook that any scale uses.
        usage_by_scale, perplexity_by_scale: the same for every scale.
    """

    num_images: int
    psnr: float
    psnr_by_scale: list[float]
    usage: float
    usage_by_scale: list[float]
    perplexity_by_scale: list[float]

    def as_floats(self) -> dict[str, float]:
        """Flat names for a log line."""
        values = {"val/psnr": self.psnr, "val/usage": self.usage}
        for name in ("psnr", "usage", "perplexity"):
            values |= {f"val/{name}_scale{k}": v for k, v in enumerate(getattr(self, f"{name}_by_scale"))}
        return values


@torch.no_grad()
def tokenizer_scores(tokenizer: MultiScaleVQVAE, images: "Dataset[Sample]", *, limit: int = 1024) -> TokenizerScores:
    """Measure a tokenizer on `limit` images of a data set, evenly spread over it."""
    device = tokenizer.codebook.weight.device
    chosen = spread(len(images), limit)  # pyright: ignore[reportArgumentType]  map-style data sets have a length
    values, partial = [], []
    starts = range(0, len(chosen), 32)
    shown = {starts[i] for i in spread(len(starts), 2)}
    usage = CodebookUsage(tokenizer.schedule.num_scales, tokenizer.codebook.num_embeddings, decay=0.0)
    counts = torch.zeros(tokenizer.schedule.num_scales, tokenizer.codebook.num_embeddings)
    for start in starts:
        batch = _stack(images, chosen[start : start + 32]).to(device)
        token_ids = tokenizer.encode(batch).token_ids
        counts += code_counts(token_ids, tokenizer.codebook.num_embeddings).cpu()
        values.append(psnr(tokenizer.decode(token_ids), batch).cpu())
        if start in shown:
            by_scale = [
                psnr(tokenizer.decode_features(tokenizer.features_up_to(token_ids, k)), batch).cpu()
                for k in range(tokenizer.schedule.num_scales)
            ]
            partial.append(torch.stack(by_scale, dim=1))
    usage.update(counts)
    return TokenizerScores(
        num_images=len(chosen),
        psnr=float(torch.cat(values).mean()),
        psnr_by_scale=torch.cat(partial).mean(dim=0).tolist(),
        usage=float((counts.sum(dim=0) > 0).float().mean()),
        usage_by_scale=(counts > 0).float().mean(dim=1).tolist(),
        perplexity_by_scale=usage.perplexity().tolist(),
    )


def _stack(images: "Dataset[Sample]", indices: Sequence[int] | range) -> Images:
    rows = [images[i]["image"] for i in indices]
    return torch.stack([torch.as_tensor(row) for row in rows])
