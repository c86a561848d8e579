"""What a prior of the D-AR family in training shows: samples at fixed seeds."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from isthmus.generation.flow_decoding import SolverPlan, flow_steps, image_noise
from isthmus.generation.next_token import generate_tokens
from isthmus.generation.options import SamplingOptions
from isthmus.models.next_token_prior import TokenLayout
from isthmus.pictures import save_picture, table, to_pil
from isthmus.training.dar_export import TokenizerParts
from isthmus.training.dar_previews import PREVIEW_SEED


@torch.no_grad()
def save_token_samples(
    parts: TokenizerParts,
    transformer: LlamaForCausalLM,
    layout: TokenLayout,
    class_names: Sequence[str],
    options: SamplingOptions,
    folder: Path,
    step: int,
    *,
    per_class: int = 8,
    num_classes: int = 10,
) -> Path:
    """Rows = the first classes, columns = fixed seeds: the same picture at every step, but for the training."""
    shown = min(layout.num_classes, num_classes)
    classes = list(range(shown)) or [layout.null_class_id]
    labels = torch.tensor([label for label in classes for _ in range(per_class)], device=parts.decoder.device)
    seeds = [(PREVIEW_SEED, i) for i in range(len(labels))]
    size, plan = parts.image_tokenizer.config["image_size"], SolverPlan.of(parts.scheduler)
    tokens = generate_tokens(transformer, layout, labels, seeds, options, stops=plan.stops)
    noise = image_noise(seeds, size, size)
    *_, last = flow_steps(parts.image_tokenizer, parts.decoder, parts.scheduler, plan, tokens, noise)
    pictures = to_pil(last.preview.clamp(-1, 1))
    rows = [pictures[i : i + per_class] for i in range(0, len(pictures), per_class)]
    return save_picture(table(rows, row_names=list(class_names[:shown])), folder / f"samples-{step:08d}.png")
