"""Tiny runs on images made here: 8 px, three scales, seconds of training."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from isthmus.next_scale.runs import PriorModel, PriorRun, TokenizerLoss, TokenizerModel, TokenizerRun
from isthmus.training.config import OptimConfig

OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.01)


def write_images(path: Path, *, count: int = 12, num_classes: int = 2, side: int = 12, seed: int = 0) -> str:
    """An npz of coloured squares on white, the class deciding the colour; returns its data spec."""
    generator = np.random.default_rng(seed)
    images = np.full((count, side, side, 3), 255, dtype=np.uint8)
    labels = np.arange(count) % max(num_classes, 1)
    for image, label in zip(images, labels, strict=True):
        top, left = generator.integers(0, side // 2, size=2)
        image[top : top + side // 2, left : left + side // 2, label % 3] = generator.integers(0, 100)
    np.savez(path, arr_0=images, **({"arr_1": labels} if num_classes else {}))
    return f"npz:{path}"


def tokenizer_run(data: str, out: Path, **changes) -> TokenizerRun:
    """Six steps with warm-up, quantisation, revival and (by default) the discriminator."""
    run = TokenizerRun(
        data=data,
        out=out,
        num_steps=6,
        batch_size=4,
        continuous_steps=2,
        revive_every=1,
        save_every=2,
        keep_checkpoints=9,
        log_every=1,
        validate_every=3,
        preview_every=6,
        num_workers=0,
        mixed_precision="no",  # on every processor the same arithmetic
        optim=OPTIM,
        model=TokenizerModel(
            codebook_size=16,
            codebook_dim=4,
            scale_sizes=(1, 2, 4),
            base_channels=32,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            num_phi=2,
        ),
        loss=TokenizerLoss(adversarial=0.1, adversarial_start=0.3, adversarial_warmup=0.3, discriminator_channels=8),
    )
    return replace(run, **changes)


def prior_run(data: str, out: Path, tokenizer: Path | str, **changes) -> PriorRun:
    """Six steps of a two-block SRDD prior with stochastic depth and label dropout."""
    run = PriorRun(
        data=data,
        out=out,
        tokenizer=str(tokenizer),
        num_steps=6,
        batch_size=4,
        num_views=2,
        save_every=2,
        keep_checkpoints=9,
        log_every=1,
        validate_every=3,
        preview_every=6,
        mixed_precision="no",  # on every processor the same arithmetic
        optim=OPTIM,
        model=PriorModel(width=16, num_layers=2, num_heads=2, scale_attention="markov", drop_path=0.2, init_gate=0.5),
    )
    return replace(run, **changes)
