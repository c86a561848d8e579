"""Tiny runs of the D-AR family: 8 px, four tokens in two groups, seconds of training."""

from dataclasses import replace
from pathlib import Path

from isthmus.dar.runs import (
    DiffusionTokenizerLoss,
    DiffusionTokenizerModel,
    DiffusionTokenizerRun,
    FlowDecoderModel,
    LlamaModel,
    NextTokenPriorRun,
)
from isthmus.training.config import PriorSampling
from tests.training.tiny_runs import OPTIM

# every optional loss but those with frozen networks, which take a while
LOSS = DiffusionTokenizerLoss(jump=1.0, readout=1.0, readout_size=4, noise_levels=2, times="balanced")
FROZEN = replace(
    LOSS, perceptual=0.1, perceptual_taps=(0, 2), alignment=0.1, alignment_layer=1, readout_from="condition"
)


def diffusion_tokenizer_run(data: str, out: Path, **changes) -> DiffusionTokenizerRun:
    """Six steps: two without quantisation, a codebook from encoder outputs, revival at every step."""
    run = DiffusionTokenizerRun(
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
        validation_images=4,
        optim=OPTIM,
        model=DiffusionTokenizerModel(
            image_size=8,
            patch_size=4,
            width=16,
            num_layers=1,
            condition_width=16,
            num_condition_layers=1,
            head_width=8,
            num_tokens=4,
            num_groups=2,
            codebook_size=16,
            codebook_dim=4,
            table_rows=4,
            # narrow queries, or the encoder's output says which token it is and hardly anything about the image
            low_rank_queries=False,
            query_std=0.01,
            init_gate=1.0,
        ),
        decoder=FlowDecoderModel(
            patch_size=2, width=16, num_layers=2, head_width=8, position_table=True, prediction="image", init_gate=0.5
        ),
        loss=LOSS,
    )
    return replace(run, **changes)


def next_token_prior_run(data: str, out: Path, tokenizer: Path | str, **changes) -> NextTokenPriorRun:
    """Six steps of a two-block Llama with every dropout."""
    run = NextTokenPriorRun(
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
        model=LlamaModel(width=16, num_layers=2, num_heads=2, feed_forward_width=32),
        sampling=PriorSampling(guidance="2", top_p=0.95),
    )
    return replace(run, **changes)
