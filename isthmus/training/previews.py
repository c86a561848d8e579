"""Pictures while training: reconstructions of held-out images, and samples at fixed seeds."""

from collections.abc import Sequence
from pathlib import Path

import torch

from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource
from isthmus.generation.next_scale import generate_scales
from isthmus.generation.options import SamplingOptions
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pictures import save_picture, spread, table, to_pil

_PREVIEW_SEED = 0


@torch.no_grad()
def save_reconstructions(
    tokenizer: MultiScaleVQVAE, source: ImageSource, folder: Path, step: int, *, num_images: int = 8
) -> Path:
    """Rows = held-out images; columns = scales 0..k added up, the image itself last."""
    views = EvaluationImages(source, tokenizer.image_size)
    chosen = spread(len(views), num_images)
    images = torch.stack([torch.as_tensor(views[i]["image"]) for i in chosen]).to(tokenizer.device)
    token_ids = tokenizer.encode(images).token_ids
    steps = [
        to_pil(tokenizer.decode_features(tokenizer.features_up_to(token_ids, k)))
        for k in range(tokenizer.schedule.num_scales)
    ]
    names = [f"{s} x {s}" for s in tokenizer.schedule.sizes] + ["image"]
    rows = list(zip(*steps, to_pil(images), strict=True))
    return save_picture(table(rows, column_names=names), folder / f"reconstructions-{step:08d}.png")


def save_samples(
    tokenizer: MultiScaleVQVAE,
    transformer: NextScaleTransformer,
    class_names: Sequence[str],
    options: SamplingOptions,
    folder: Path,
    step: int,
    *,
    per_class: int = 8,
    num_classes: int = 10,
) -> Path:
    """Rows = the first classes, columns = fixed seeds: the same picture at every step, but for the training."""
    shown = min(transformer.null_class_id, num_classes)
    classes = list(range(shown)) or [transformer.null_class_id]
    labels = torch.tensor([label for label in classes for _ in range(per_class)], device=transformer.device)
    seeds = [(_PREVIEW_SEED, i) for i in range(len(labels))]
    features = None
    for scale in generate_scales(tokenizer, transformer, labels, seeds, options):
        features = scale.features
    assert features is not None, "a schedule has at least one scale"
    pictures = to_pil(tokenizer.decode_features(features))
    rows = [pictures[i : i + per_class] for i in range(0, len(pictures), per_class)]
    return save_picture(table(rows, row_names=list(class_names[:shown])), folder / f"samples-{step:08d}.png")
