"""Runs of the D-AR family, and named ones. Nothing heavy is imported: the command line is derived from them."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from isthmus.dar.options import Solver
from isthmus.errors import UserError
from isthmus.nn.component_files import read_config
from isthmus.training.arguments import arguments_of
from isthmus.training.config import (
    IMAGENET_IMAGES,
    SMALL,
    AugmentConfig,
    CaptionsConfig,
    ImagesRun,
    OptimConfig,
    PerceptualLoss,
    Preset,
    PriorSampling,
    TokensRun,
    must,
    preset_run,
)


class DiffusionTokenizerModel(
    arguments_of(
        "isthmus.dar.tokenizer:DiffusionTokenizer",
        ["image_size", "patch_size", "width", "num_layers", "condition_width", "num_condition_layers", "head_width"]
        + ["num_tokens", "num_groups", "tokens_per_step", "codebook_size", "codebook_dim", "table_rows"]
        + ["low_rank_queries", "query_rank", "query_std", "init_gate", "position_table", "linear_query_rank"]
        + ["linear_query_side", "latent_norm", "quantized"],
    )
):
    """Arguments of `DiffusionTokenizer`; None takes the preset's value, or with --from the model's."""


@dataclass(frozen=True, kw_only=True)
class FlowDecoderModel(
    arguments_of(
        "isthmus.dar.decoder:FlowDecoder",
        ["patch_size", "width", "num_layers", "head_width", "shared_time_embedding", "adaptive_head", "prediction"]
        + ["canvas_side", "canvas_rank", "init_gate", "modulation_std"],
    )
):
    """Arguments of `FlowDecoder`; None takes the preset's value, or with --from the model's.

    Two of them follow from the tokenizer, and a run says whether they are there.
    """

    position_table: bool | None = None
    """Add a learned table of positions to the patches, of the grid of the training images."""
    canvas: bool | None = None
    """Tokens paint a small image together, which the decoder reads and corrects; False is the published network."""


class FlowSettings(
    arguments_of(
        "isthmus.dar.scheduler:FlowMatchingScheduler",
        ["num_inference_steps", "time_shift", "data_std", "solver"],
        Solver=Solver,
    )
):
    """Arguments of `FlowMatchingScheduler`; None takes the preset's value, or with --from the model's."""


@dataclass(frozen=True, kw_only=True)
class DiffusionTokenizerLoss(PerceptualLoss):
    """Weights of the losses, and the noise levels they are measured at. 0 leaves a loss out.

    The perceptual distance is that of the image that `jump` is about.
    """

    flow: float = 1.0
    """Squared error of the velocity over data_std^2."""
    codebook: float = 1.0
    """Squared error that moves codes to latents, over the tokens up to the group of the noise level."""
    commitment: float = 0.25
    """Squared error that moves latents to codes, over the same tokens."""
    jump: float = 0.0
    """Squared error of the image that one straight step from here to the end would give."""
    canvas: float = 0.0
    """Squared error of the image that the tokens so far have painted; for decoders with a canvas."""
    perceptual_taps: tuple[int, ...] = (0, 2, 4, 10, 14)
    """lite0 only: blocks that are compared; the last ones see little in small images."""
    alignment: float = 0.0
    """1 - cosine between a projection of the decoder's inner features and those of a frozen network (REPA)."""
    alignment_layer: int = 8
    """Decoder blocks before the features that are aligned."""
    alignment_network: Literal["lite0", "dinov2"] = "lite0"
    """EfficientNet-Lite0 (comes with Isthmus) or DINOv2 (needs alignment_folder)."""
    alignment_taps: tuple[int, ...] = (2, 4, 10)
    """lite0 only: blocks whose features are aligned with."""
    alignment_folder: Path | None = None
    """dinov2 only: folder that transformers saved the network in."""
    readout: float = 0.0
    """Squared error of small images that a linear map reads off the tokens of the first groups, for each number."""
    readout_from: Literal["codes", "condition"] = "codes"
    """What is read: the codes themselves, or what the causal stack makes of a group's window."""
    readout_size: int = 16
    """Side of those small images in pixels."""
    noise_levels: int = 1
    """Noise levels that the decoder is trained on per encoded image."""
    times: Literal["uniform", "balanced"] = "uniform"
    """uniform: raw times over [0, latest_time), which gives the first group half of its share (published);
    balanced: the same number of noise levels for every group."""
    latest_time: float = 1.0
    """Largest raw time that is drawn (0 = noise, 1 = image)."""

    def __post_init__(self):
        super().__post_init__()
        must("not be negative", self, "flow", "codebook", "commitment", "jump", "canvas", "alignment", "readout")
        must("be positive", self, "noise_levels", "latest_time", "readout_size", "alignment_layer")
        must("lie in [0, 1]", self, "latest_time")
        if not self.perceptual_taps or not self.alignment_taps:
            raise UserError("loss.perceptual_taps and loss.alignment_taps need at least one block each, got none.")
        if (self.alignment_network == "dinov2") != (self.alignment_folder is not None):
            raise UserError(
                f"loss.alignment_folder goes with loss.alignment_network dinov2, got {self.alignment_folder} with "
                f"{self.alignment_network}. Pass both or neither."
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionTokenizerRun(ImagesRun):
    """`isthmus train tokenizer` for the D-AR family."""

    gap_warning: float = 0.5
    """Gain in dB of an image's own codes over another image's under which a warning is printed."""
    validation_images: int = 128
    """Held-out images that are decoded while training, once with their own and once with another image's codes."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass, for memory."""
    model: DiffusionTokenizerModel = field(default_factory=DiffusionTokenizerModel)
    """Tokenizer."""
    decoder: FlowDecoderModel = field(default_factory=FlowDecoderModel)
    """Decoder."""
    flow: FlowSettings = field(default_factory=FlowSettings)
    """Diffusion."""
    loss: DiffusionTokenizerLoss = field(default_factory=DiffusionTokenizerLoss)
    """Losses."""

    def __post_init__(self):
        super().__post_init__()
        must("not be negative", self, "gap_warning")
        if self.validation_images < 2:
            raise UserError(
                f"validation_images must be at least 2 (codes are compared with another image's), got "
                f"{self.validation_images}."
            )


class LlamaModel(
    arguments_of("isthmus.dar.prior:llama_config", ["width", "num_layers", "num_heads", "feed_forward_width"])
):
    """Sizes of the Llama; None takes the preset's value, or with --from the model's."""


@dataclass(frozen=True, kw_only=True)
class WordsConfig(CaptionsConfig):
    """Captions in the place of classes, as words before tokens; None takes the default, or with --from the model's."""

    encoder: str = ""
    """small: the Llama reads the words of captions. Empty reads no captions, or with --from a model of texts goes on
    with its words."""

    def __post_init__(self):
        super().__post_init__()
        if self.encoder not in ("", SMALL):
            raise UserError(
                f"a D-AR prior reads the words of captions, not what an encoder makes of them, got text.encoder "
                f"{self.encoder}. Pass --text small."
            )


@dataclass(frozen=True, kw_only=True)
class NextTokenPriorRun(TokensRun):
    """`isthmus train prior` for the D-AR family."""

    embedding_dropout: float = 0.1
    """Share of the entries of embedded tokens that are zeroed."""
    residual_dropout: float = 0.1
    """Share of what attention and feed-forward add to the residual stream that is zeroed."""
    model: LlamaModel = field(default_factory=LlamaModel)
    """Network."""
    text: WordsConfig = field(default_factory=WordsConfig, metadata={"later": True})
    """Captions."""

    def __post_init__(self):
        super().__post_init__()
        must("lie in [0, 1)", self, "embedding_dropout", "residual_dropout")
        self.text.check_read(self.from_model)


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


diffusion_tokenizer_preset = partial(preset_run, DIFFUSION_TOKENIZER_PRESETS, "D-AR tokenizer")
next_token_prior_preset = partial(preset_run, NEXT_TOKEN_PRIOR_PRESETS, "D-AR prior")


def describe_folder(folder: Path) -> tuple[dict[str, str], int]:
    """What `isthmus info` says of a saved pipeline that only this family has, and its number of classes."""
    tokenizer, decoder, llama = (read_config(folder / n) for n in ("image_tokenizer", "decoder", "transformer"))
    scheduler = read_config(folder / "scheduler", "scheduler_config.json")
    tokens, groups = tokenizer["num_tokens"], tokenizer["num_groups"]
    rows = {
        "model": "DARPipeline, a Llama whose tokens drive a pixel diffusion",
        "image size": f"{tokenizer['image_size']} px (patches of {decoder['patch_size']})",
        "tokens": f"{tokens} in {groups} groups",
        "steps": f"{scheduler['num_inference_steps']}, {scheduler['solver']}, time shift {scheduler['time_shift']:g}",
        "codebook": f"{tokenizer['codebook_size']} codes of width {tokenizer['codebook_dim']}",
        "transformer": f"width {llama['hidden_size']}, {llama['num_hidden_layers']} layers, "
        f"{llama['num_attention_heads']} heads",
    }
    num_words = llama.get("num_words", 0)
    if num_words:
        rows["prompts"] = f"up to {llama['prompt_length']} words, of {num_words}"
    return rows, llama["vocab_size"] - tokenizer["codebook_size"] - 1 - num_words
