"""Tiny real networks: every weight random, nothing trained."""

import torch

from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.text.encoders import SmallTextEncoder

NAMES = ["face", "flag", "hand", "tree"]


def _tokenizer() -> MultiScaleVQVAE:
    return MultiScaleVQVAE(
        codebook_size=16, codebook_dim=4, scale_sizes=(1, 2, 4), base_channels=32, channel_multipliers=(1, 1),
        num_res_blocks=1,
    )  # fmt: skip


def _transformer(**arguments) -> NextScaleTransformer:
    transformer = NextScaleTransformer(
        scale_sizes=(1, 2, 4), codebook_size=16, codebook_dim=4, width=16, num_layers=2, num_heads=2, init_gate=1.0,
        init_modulation=1.0, **arguments,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return transformer


def tiny_pipeline(*, scale_attention: str = "markov", num_classes: int = 3, names: bool = True, **options):
    """A pipeline of 2 blocks on scales 1, 2, 4 whose logits are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        transformer = _transformer(num_classes=num_classes, scale_attention=scale_attention)
    class_names = NAMES[:num_classes] if names else None
    return NextScalePipeline(tokenizer.eval(), transformer.eval(), class_names=class_names, **options)


SIZED = {"norm": "rms_sandwich", "l2_attention": False, "size_condition": True}


def tiny_text_pipeline(
    *, scale_attention: str = "markov", num_classes: int = 0, text_encoder=None, design=None, **options
):
    """The same, reading prompts: words in every block, and the whole where the class stands."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, small = _tokenizer(), SmallTextEncoder(width=12, num_layers=1)
        encoder = small if text_encoder is None else text_encoder
        transformer = _transformer(
            num_classes=num_classes,
            scale_attention=scale_attention,
            text_width=encoder.text_width,
            text_pooled_width=encoder.pooled_width,
            **(design or {}),
        )
        with torch.no_grad():
            small.word_embedding.weight.mul_(20)  # prompts far apart
    parts = (tokenizer.eval(), transformer.eval())
    return NextScalePipeline(*parts, class_names=NAMES[:num_classes], text_encoder=encoder.eval(), **options)
