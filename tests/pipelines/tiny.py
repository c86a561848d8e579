"""Tiny real networks: every weight random, nothing trained."""

import torch

from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer


def tiny_pipeline(*, scale_attention: str = "markov", num_classes: int = 3, names: bool = True, **options):
    """A pipeline of 2 blocks on scales 1, 2, 4 whose logits are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleVQVAE(
            codebook_size=16, codebook_dim=4, scale_sizes=(1, 2, 4), base_channels=32, channel_multipliers=(1, 1),
            num_res_blocks=1,
        )  # fmt: skip
        transformer = NextScaleTransformer(
            scale_sizes=(1, 2, 4), codebook_size=16, codebook_dim=4, width=16, num_layers=2, num_heads=2,
            num_classes=num_classes, scale_attention=scale_attention, init_gate=1.0, init_modulation=1.0,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    class_names = ["face", "flag", "hand", "tree"][:num_classes] if names else None
    return NextScalePipeline(tokenizer.eval(), transformer.eval(), class_names=class_names, **options)
