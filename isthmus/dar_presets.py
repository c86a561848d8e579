"""Named starting points for runs of the D-AR family. This file imports nothing heavy."""

from dataclasses import replace

from isthmus.presets import IMAGENET_IMAGES, Preset, find_preset
from isthmus.training.config import AugmentConfig, OptimConfig, PriorSampling
from isthmus.training.dar_config import (
    DiffusionTokenizerLoss,
    DiffusionTokenizerModel,
    DiffusionTokenizerRun,
    FlowDecoderModel,
    FlowSettings,
    LlamaModel,
    NextTokenPriorRun,
)

PUBLISHED_SOURCE = "README of the published code and Gao and Shou 2025 (its own evaluation, guidance rising linearly)"

# Beyond the published network: linear queries and a canvas, which let codes reach the pixels from the first step on;
# without them the decoder of so short a training hardly listens to its codes (docs/dar.md has the comparison).
_SMALL_TOKENIZER = DiffusionTokenizerRun(
    num_steps=960,
    validate_every=240,
    preview_every=480,
    batch_size=48,
    ema_decay=0.995,
    continuous_steps=200,
    revive_every=50,
    optim=OptimConfig(
        learning_rate=1.5e-3,
        schedule="cosine",
        warmup_steps=50,
        plateau=0.5,
        final_ratio=0.02,
        weight_decay=0.0,
        max_grad_norm=1.0,
    ),
    model=DiffusionTokenizerModel(
        image_size=32,
        patch_size=4,
        width=96,
        num_layers=2,
        condition_width=64,
        num_condition_layers=2,
        head_width=32,
        num_tokens=32,
        num_groups=8,
        codebook_size=512,
        codebook_dim=8,
        table_rows=32,
        low_rank_queries=False,
        query_std=0.1,
        init_gate=1.0,
        position_table=True,
        linear_query_rank=16,
        linear_query_side=16,
        latent_norm=True,
    ),
    decoder=FlowDecoderModel(
        patch_size=4,
        width=64,
        num_layers=4,
        head_width=32,
        position_table=True,
        prediction="image",
        canvas=True,
        canvas_side=16,
        canvas_rank=16,
        init_gate=1.0,
    ),
    flow=FlowSettings(num_inference_steps=8, time_shift=8.0, data_std=0.6, solver="euler"),
    loss=DiffusionTokenizerLoss(
        flow=0.3,
        jump=1.0,
        canvas=1.0,
        perceptual=0.5,
        # the later blocks see little at 32 px and are most of the cost
        perceptual_taps=(0, 2, 4),
        noise_levels=1,
        times="balanced",
        latest_time=15 / 16,
    ),
)

DIFFUSION_TOKENIZER_PRESETS: dict[str, Preset[DiffusionTokenizerRun]] = {
    "dar-small-32": Preset("D-AR at 32 px on a laptop: about nine minutes on two cores", _SMALL_TOKENIZER, 1.59),
    "dar-small-64": Preset(
        "D-AR at 64 px on a laptop: about an hour on two cores",
        replace(
            _SMALL_TOKENIZER,
            num_steps=3000,
            continuous_steps=600,
            model=replace(
                _SMALL_TOKENIZER.model, image_size=64, patch_size=8, num_tokens=64, table_rows=64, codebook_size=1024
            ),
            decoder=replace(_SMALL_TOKENIZER.decoder, patch_size=8, width=96),
        ),
        2.98,
    ),
    "dar-tokenizer-v1": Preset(
        "network of the published D-AR tokenizer, 256 px, with its recipe for GPUs (Lite0 in place of LPIPS and "
        "DINOv2, which need files of yours: --loss.perceptual-network lpips, --loss.alignment-network dinov2)",
        DiffusionTokenizerRun(
            num_steps=210_000,
            batch_size=1024,
            ema_decay=0.999,
            continuous_steps=0,
            revive_every=0,
            validate_every=5000,
            preview_every=5000,
            save_every=5000,
            checkpoint_activations=True,
            augment=AugmentConfig(resize_ratio=1.125, flip=True),
            optim=OptimConfig(
                learning_rate=2e-4, schedule="constant", warmup_steps=500, weight_decay=0.0, max_grad_norm=1.0
            ),
            model=DiffusionTokenizerModel(
                image_size=256,
                patch_size=16,
                width=768,
                num_layers=8,
                condition_width=768,
                num_condition_layers=8,
                head_width=64,
                num_tokens=256,
                num_groups=8,
                codebook_size=16384,
                codebook_dim=8,
                table_rows=1024,
                low_rank_queries=True,
                query_rank=8,
                query_std=1.0,
                init_gate=0.0,
                position_table=False,
                latent_norm=False,
                quantized=True,
            ),
            decoder=FlowDecoderModel(
                patch_size=8,
                width=768,
                num_layers=12,
                head_width=64,
                shared_time_embedding=False,
                adaptive_head=False,
                position_table=False,
                prediction="velocity",
            ),
            flow=FlowSettings(num_inference_steps=8, time_shift=2.0, data_std=0.6, solver="adams-bashforth"),
            loss=DiffusionTokenizerLoss(perceptual=0.5, alignment=0.5, alignment_layer=8),
        ),
        300.10,
    ),
    "finetune-dar-tokenizer": Preset(
        "continue a saved D-AR tokenizer at a lower rate",
        DiffusionTokenizerRun(
            num_steps=1000,
            continuous_steps=0,
            revive_every=0,
            ema_decay=0.995,
            optim=OptimConfig(
                learning_rate=2e-4, schedule="cosine", warmup_steps=20, final_ratio=0.05, weight_decay=0.0
            ),
        ),
    ),
}


def _published_prior(
    name: str, *, width: int, num_layers: int, num_heads: int, params: float, guidance: str, fid: float | None = None
) -> Preset[NextTokenPriorRun]:
    """Recipe of the paper: 300 epochs' worth of ImageNet, the rate falling over the last sixth."""
    run = NextTokenPriorRun(
        num_steps=360_000,
        batch_size=1024,
        ema_decay=0.9999,
        num_views=10,
        save_every=5000,
        validate_every=5000,
        preview_every=5000,
        augment=AugmentConfig(resize_ratio=1.1, flip=True),
        optim=OptimConfig(
            learning_rate=4e-4,
            schedule="linear",
            warmup_steps=0,
            plateau=5 / 6,
            final_ratio=0.025,
            weight_decay=0.05,
            max_grad_norm=1.0,
        ),
        model=LlamaModel(width=width, num_layers=num_layers, num_heads=num_heads),
        sampling=PriorSampling(guidance=guidance, top_k=None, top_p=None),
    )
    epochs = run.batch_size * run.num_steps // IMAGENET_IMAGES
    about = f"published recipe of D-AR-{name} for ImageNet at 256 px ({epochs} epochs)"
    return Preset(about, run, params, fid, PUBLISHED_SOURCE if fid else "")


NEXT_TOKEN_PRIOR_PRESETS: dict[str, Preset[NextTokenPriorRun]] = {
    "dar-prior-small": Preset(
        "Llama over D-AR tokens on a laptop: three minutes on two cores",
        NextTokenPriorRun(
            num_steps=720,
            validate_every=144,
            preview_every=360,
            batch_size=32,
            ema_decay=0.995,
            num_views=6,
            optim=OptimConfig(
                learning_rate=1.5e-3, schedule="cosine", warmup_steps=50, final_ratio=0.02, max_grad_norm=1.0
            ),
            model=LlamaModel(width=192, num_layers=4, num_heads=3),
            sampling=PriorSampling(guidance="3.5", top_k=None, top_p=0.9),
        ),
    ),
    "dar-b": _published_prior("B", width=768, num_layers=12, num_heads=12, params=111.66, guidance="linear:1.1:8"),
    "dar-l": _published_prior(
        "L", width=1024, num_layers=24, num_heads=16, params=343.94, guidance="linear:1.1:8", fid=2.44
    ),
    "dar-xl": _published_prior(
        "XL", width=1280, num_layers=36, num_heads=20, params=775.98, guidance="linear:1.1:10", fid=2.09
    ),
    "dar-xxl": _published_prior(
        "XXL", width=1536, num_layers=48, num_heads=24, params=1412.51, guidance="linear:1.1:10", fid=2.00
    ),
    "finetune-dar-prior": Preset(
        "continue a saved D-AR prior on other images: lower rate, short warm-up",
        NextTokenPriorRun(
            num_steps=500,
            batch_size=16,
            ema_decay=0.995,
            optim=OptimConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=20, final_ratio=0.05),
        ),
    ),
}


def diffusion_tokenizer_preset(name: str) -> DiffusionTokenizerRun:
    """The run of a D-AR tokenizer preset. Raises `UserError` for an unknown name."""
    return replace(find_preset(DIFFUSION_TOKENIZER_PRESETS, name, "D-AR tokenizer").run, preset=name)


def next_token_prior_preset(name: str) -> NextTokenPriorRun:
    """The run of a D-AR prior preset. Raises `UserError` for an unknown name."""
    return replace(find_preset(NEXT_TOKEN_PRIOR_PRESETS, name, "D-AR prior").run, preset=name)
