"""Tiny teachers on four scales, 8 px: every weight random, logits far from uniform, nothing trained."""

from pathlib import Path

import torch

from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.runs import DistillRun
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.text.encoders import SmallTextEncoder
from isthmus.text.pretrained import PretrainedTextEncoder
from tests.training.tiny_runs import OPTIM

SIZES = (1, 2, 3, 4)
CODES, WIDTH = 16, 8


def tiny_teacher(
    scale_attention: str = "markov",
    *,
    phi_ratio: float = 0.5,
    sizes: tuple[int, ...] = SIZES,
    num_classes: int = 2,
    text_encoder: SmallTextEncoder | PretrainedTextEncoder | None = None,
) -> NextScalePipeline:
    """A pipeline of two classes, "0" and "1"; with `text_encoder` it reads captions, and may have no classes (0)."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = MultiScaleVQVAE(
            codebook_size=CODES, codebook_dim=CODES, scale_sizes=sizes, base_channels=32, channel_multipliers=(1, 1),
            num_res_blocks=1, num_phi=2, phi_ratio=phi_ratio,
        )  # fmt: skip
        transformer = NextScaleTransformer(
            scale_sizes=sizes, codebook_size=CODES, codebook_dim=CODES, width=WIDTH, num_layers=2, num_heads=2,
            num_classes=num_classes, scale_attention=scale_attention, init_gate=1.0, init_modulation=1.0,
            text_width=text_encoder and text_encoder.text_width,
            text_pooled_width=text_encoder and text_encoder.pooled_width,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    names = ["0", "1"][:num_classes]
    return NextScalePipeline(tokenizer.eval(), transformer.eval(), class_names=names, text_encoder=text_encoder)


def distill_run(data: str, out: Path, teacher: Path, **changes) -> DistillRun:
    """Four steps, without the student that has no teacher."""
    settings = {
        "data": data,
        "out": out,
        "from_model": str(teacher),
        "scale_sizes": (1, 3, 4),
        "num_steps": 4,
        "batch_size": 4,
        "num_views": 2,
        "save_every": 2,
        "keep_checkpoints": 9,
        "log_every": 1,
        "validate_every": 4,
        "preview_every": 4,
        "mixed_precision": "no",  # on every processor the same arithmetic
        "optim": OPTIM,
        "baseline": False,
    }
    return DistillRun(**(settings | changes))
