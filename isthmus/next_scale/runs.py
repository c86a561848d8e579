"""Runs of the next-scale family, and named ones. Nothing heavy is imported: the command line is derived from them."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from isthmus.errors import UserError
from isthmus.nn.component_files import read_config
from isthmus.training.arguments import arguments_of
from isthmus.training.config import (
    IMAGENET_IMAGES,
    SMALL,
    AugmentConfig,
    ImagesRun,
    OptimConfig,
    PerceptualLoss,
    Preset,
    PriorSampling,
    TextConfig,
    TokensRun,
    must,
    preset_run,
)


class TokenizerModel(
    arguments_of(
        "isthmus.next_scale.tokenizer:MultiScaleVQVAE",
        ["codebook_size", "codebook_dim", "scale_sizes", "base_channels", "channel_multipliers", "num_res_blocks"]
        + ["num_phi", "dropout", "pixel_unshuffle"],
    )
):
    """Arguments of `MultiScaleVQVAE`; None takes the preset's value, or with --from the model's."""


@dataclass(frozen=True, kw_only=True)
class TokenizerLoss(PerceptualLoss):
    """Weights of the tokenizer's losses."""

    l1: float = 0.2
    """Absolute error."""
    mse: float = 1.0
    """Squared error."""
    codebook: float = 1.0
    """Codebook and commitment loss together."""
    adversarial: float = 0.0
    """Patch discriminator; 0 trains without one."""
    adversarial_start: float = 0.4
    """Share of the steps after which the discriminator starts."""
    adversarial_warmup: float = 0.05
    """Share of the steps over which its weight rises from 0."""
    discriminator_channels: int = 64
    """Width of the first layer of the discriminator."""
    discriminator_learning_rate: float = 3e-4
    """Peak learning rate of the discriminator."""

    def __post_init__(self):
        super().__post_init__()
        must("not be negative", self, "l1", "mse", "codebook", "adversarial")
        must("lie in [0, 1]", self, "adversarial_start", "adversarial_warmup")
        must("be positive", self, "discriminator_channels", "discriminator_learning_rate")


@dataclass(frozen=True, kw_only=True)
class TokenizerRun(ImagesRun):
    """`isthmus train tokenizer`."""

    image_size: int | None = None
    """Side of the images in pixels; None takes the model's."""
    model: TokenizerModel = field(default_factory=TokenizerModel)
    """Network."""
    loss: TokenizerLoss = field(default_factory=TokenizerLoss)
    """Losses."""

    def __post_init__(self):
        super().__post_init__()
        must("be positive", self, "image_size")

    def tied_to_length(self, before: int, taken: int) -> list[str]:
        """Also the start of the discriminator, which is a share of the steps."""
        tied = super().tied_to_length(before, taken)
        if self.loss.adversarial and taken > round(self.loss.adversarial_start * min(before, self.num_steps)):
            tied.append(f"loss.adversarial {self.loss.adversarial}")
        return tied


class PriorModel(
    arguments_of(
        "isthmus.next_scale.transformer:NextScaleTransformer",
        ["width", "num_layers", "num_heads", "scale_attention", "shared_adaln", "l2_attention", "mlp_ratio"]
        + ["drop_path", "init_gate"],
        later=["position"],
        _Position=Literal["learned", "rope2d"],
    )
):
    """Arguments of `NextScaleTransformer`; None takes the preset's value, or with --from the model's."""


@dataclass(frozen=True, kw_only=True)
class PriorRun(TokensRun):
    """`isthmus train prior`."""

    scale_loss: Literal["token-uniform", "lognormal"] = "token-uniform"
    """Loss weights over scales: the same for every token (VAR), or a log-normal bump (SRDD)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    scales_per_step: int | None = None
    """Train a random subset of this many scales per step (markov only), for memory; None trains all."""
    refinement_probability: float = 0.0
    """Share of the scales of training images whose input shows a random part of the scale's own tokens, the loss being
    on the others: for draws that are refined in masked rounds. Causal: share of the images, at one scale each."""
    compile: bool = False
    """torch.compile the blocks, on a CPU too where it has a C++ compiler: faster steps after a wait. Results equal
    those of other runs within rounding."""
    model: PriorModel = field(default_factory=PriorModel)
    """Network."""
    text: TextConfig = field(default_factory=TextConfig, metadata={"later": True})
    """Captions."""

    def __post_init__(self):
        super().__post_init__()
        must("lie in [0, 1]", self, "label_smoothing", "refinement_probability")
        must("be positive", self, "scales_per_step")
        self.text.check_read(self.from_model)


@dataclass(frozen=True, kw_only=True)
class DistillRun(TokensRun):
    """`isthmus distill`; `from_model` is the teacher."""

    label_dropout: float = 0.1
    """Share of labels replaced by the null label, and of captions by the empty one, for guidance."""
    scale_sizes: tuple[int, ...] | None = None
    """Sides of the student's scales: some of the teacher's, with its first and its last; None keeps them all."""
    scale_attention: Literal["causal", "markov"] | None = None
    """The student's mask; None keeps the teacher's."""
    progressive: bool = False
    """Remove one scale at a time, the finest first; each student teaches the next, num_steps each."""
    distillation_weight: float = 1.0
    """Weight of what the teacher says beside the cross-entropy on data tokens; 0 trains without a teacher."""
    scale_loss: Literal["token-uniform", "lognormal"] = "token-uniform"
    """Weights over scales of both losses: the same for every token, or a log-normal bump."""
    baseline: bool = True
    """Also train the same student without the teacher, as long: it doubles the cost, and nothing else tells whether the
    teacher helped. Not done where the student has none itself (distillation_weight 0, all scales removed at once)."""

    def __post_init__(self):
        super().__post_init__()
        must("not be negative", self, "distillation_weight")


SCALES_32 = (1, 2, 3, 4, 6, 8)
SCALES_64 = (1, 2, 3, 4, 6, 8, 12, 16)
SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PUBLISHED_SOURCE = "Tian et al. 2024, README of the published code (its own evaluation, guidance 1.5)"


def _published_prior(
    depth: int,
    *,
    fid: float,
    params: float,
    gate: float,
    peak: float,
    final_ratio: float,
    epochs: int,
    final_weight_decay: float = 0.05,
    batch_size: int = 768,
    pixels: int = 256,
    shared_adaln: bool = False,
) -> Preset[PriorRun]:
    num_steps = epochs * IMAGENET_IMAGES // batch_size
    run = PriorRun(
        batch_size=batch_size,
        num_steps=num_steps,
        ema_decay=0.9999,
        num_views=1,
        save_every=5000,
        validate_every=5000,
        preview_every=5000,
        augment=AugmentConfig(resize_ratio=1.125, flip=False),
        optim=OptimConfig(
            learning_rate=peak,
            warmup_steps=num_steps // 50,
            final_ratio=final_ratio,
            final_weight_decay=final_weight_decay,
        ),
        model=PriorModel(
            width=64 * depth,
            num_layers=depth,
            num_heads=depth,
            scale_attention="causal",
            shared_adaln=shared_adaln,
            l2_attention=True,
            mlp_ratio=4.0,
            drop_path=0.1 * depth / 24,
            init_gate=gate,
        ),
        sampling=PriorSampling(guidance="linear:1:2.5", top_k=900, top_p=0.96),
    )
    return Preset(f"published recipe of VAR-d{depth} for ImageNet at {pixels} px", run, params, fid, PUBLISHED_SOURCE)


def _markov(preset: Preset[PriorRun], about: str) -> Preset[PriorRun]:
    model = replace(preset.run.model, scale_attention="markov")
    run = replace(preset.run, model=model, scale_loss="lognormal")
    return Preset(about, run, preset.expected_params_millions)


_SMALL_TOKENIZER = TokenizerRun(
    num_steps=700,
    validate_every=140,
    preview_every=350,
    batch_size=16,
    ema_decay=0.995,
    revive_every=50,
    optim=OptimConfig(
        learning_rate=2e-3, schedule="cosine", warmup_steps=50, final_ratio=0.02, weight_decay=0.0, max_grad_norm=1.0
    ),
    model=TokenizerModel(
        codebook_size=512,
        codebook_dim=16,
        scale_sizes=SCALES_32,
        base_channels=32,
        # 64 channels on a quarter of the places: two and a half times the images per second of 32 channels on all
        channel_multipliers=(2, 2),
        pixel_unshuffle=2,
        num_res_blocks=1,
        num_phi=4,
        dropout=0.0,
    ),
)

TOKENIZER_PRESETS: dict[str, Preset[TokenizerRun]] = {
    "small-32": Preset("32 px on a laptop: two to three minutes on two cores", _SMALL_TOKENIZER, 0.95),
    # narrow, many steps, and few pixels behind a code: eyes and mouths of drawings come through (docs/benchmarks.md)
    "fast-48": Preset(
        "drawings of 48 px on a laptop: a minute on two cores",
        replace(
            _SMALL_TOKENIZER,
            num_steps=800,
            validate_every=200,
            preview_every=400,
            optim=replace(_SMALL_TOKENIZER.optim, learning_rate=3e-3),
            model=replace(
                _SMALL_TOKENIZER.model,
                scale_sizes=(1, 2, 4, 6, 12),
                base_channels=64,
                channel_multipliers=(1,),
                pixel_unshuffle=4,
            ),
        ),
        0.70,
    ),
    "small-64": Preset(
        "64 px on a laptop: about forty minutes on two cores",
        replace(
            _SMALL_TOKENIZER,
            num_steps=2000,
            model=replace(
                _SMALL_TOKENIZER.model,
                scale_sizes=SCALES_64,
                codebook_size=1024,
                channel_multipliers=(1, 1, 2),
                pixel_unshuffle=1,
            ),
        ),
        0.82,
    ),
    "vqvae-256": Preset(
        "network of the published tokenizer, 256 px, with a recipe for GPUs",
        TokenizerRun(
            num_steps=250 * IMAGENET_IMAGES // 768,
            batch_size=768,
            ema_decay=0.9999,
            continuous_steps=5000,
            revive_every=1000,
            validate_every=5000,
            preview_every=5000,
            save_every=5000,
            augment=AugmentConfig(resize_ratio=1.125, flip=False),
            optim=OptimConfig(
                learning_rate=3e-4,
                schedule="cosine",
                warmup_steps=4000,
                final_ratio=0.3,
                weight_decay=0.005,
                beta1=0.5,
                beta2=0.9,
                max_grad_norm=10.0,
            ),
            model=TokenizerModel(
                codebook_size=4096,
                codebook_dim=32,
                scale_sizes=SCALES_256,
                base_channels=160,
                channel_multipliers=(1, 1, 2, 2, 4),
                num_res_blocks=2,
                num_phi=4,
                dropout=0.05,
            ),
            loss=TokenizerLoss(perceptual=1.0, adversarial=0.4, adversarial_start=0.2),
        ),
        108.95,
    ),
    "finetune-tokenizer": Preset(
        "continue a saved tokenizer at a lower rate",
        TokenizerRun(
            continuous_steps=0,
            revive_every=0,
            ema_decay=0.995,
            optim=OptimConfig(
                learning_rate=2e-4, schedule="cosine", warmup_steps=20, final_ratio=0.05, weight_decay=0.0
            ),
        ),
    ),
}

_SMALL_PRIOR = PriorRun(
    num_steps=450,
    validate_every=90,
    preview_every=225,
    batch_size=16,
    ema_decay=0.995,
    num_views=6,
    optim=OptimConfig(learning_rate=1.5e-3, schedule="cosine", warmup_steps=50, final_ratio=0.02, max_grad_norm=2.0),
    model=PriorModel(
        width=192,
        num_layers=4,
        num_heads=3,
        scale_attention="markov",
        shared_adaln=False,
        l2_attention=True,
        mlp_ratio=4.0,
        drop_path=0.0,
        init_gate=0.5,
    ),
    sampling=PriorSampling(guidance="linear:1:3", top_k=None, top_p=0.95),
)

_D16 = _published_prior(16, fid=3.55, params=310.28, gate=1e-3, peak=3e-4, final_ratio=0.1, epochs=200)
_D20 = _published_prior(20, fid=2.95, params=600.92, gate=1e-3, peak=3e-4, final_ratio=0.1, epochs=250)
_D24 = _published_prior(24, fid=2.33, params=1033.40, gate=1e-4, peak=2.4e-4, final_ratio=0.01, epochs=350)

PRIOR_PRESETS: dict[str, Preset[PriorRun]] = {
    "srdd-small": Preset("SRDD on a laptop: a few minutes on two cores", _SMALL_PRIOR),
    # as fast-48: narrow and shallow, so that it sees more images; colours are decided on the first scales
    "srdd-fast": Preset(
        "SRDD of captions on a laptop, on a fast-48 tokenizer: a minute and a half on two cores",
        replace(
            _SMALL_PRIOR,
            num_steps=500,
            validate_every=100,
            preview_every=250,
            batch_size=32,
            scale_loss="lognormal",
            optim=replace(_SMALL_PRIOR.optim, learning_rate=4e-3),
            text=TextConfig(encoder=SMALL),
            model=replace(_SMALL_PRIOR.model, width=128, num_layers=3, num_heads=2),
            sampling=replace(_SMALL_PRIOR.sampling, guidance="3", temperature=0.5),
        ),
    ),
    "var-small": Preset(
        "VAR on a laptop: the same network with the causal mask",
        replace(_SMALL_PRIOR, model=replace(_SMALL_PRIOR.model, scale_attention="causal")),
    ),
    "var-d16": _D16,
    "var-d20": _D20,
    "var-d24": _D24,
    "var-d30": _published_prior(
        30,
        fid=1.97,
        params=2010.02,
        gate=1e-5,
        peak=3.2e-4,
        final_ratio=0.01,
        epochs=350,
        final_weight_decay=0.08,
        batch_size=1024,
    ),
    "var-d36-512": _published_prior(
        36,
        fid=2.63,
        params=2353.89,
        gate=5e-6,
        peak=2.4e-4,
        final_ratio=0.01,
        epochs=350,
        final_weight_decay=0.08,
        pixels=512,
        shared_adaln=True,
    ),
    "srdd-d16": _markov(_D16, "VAR-d16's recipe with the Markov mask and log-normal scale weights"),
    "srdd-d20": _markov(_D20, "VAR-d20's recipe with the Markov mask and log-normal scale weights"),
    "finetune-prior": Preset(
        "continue a saved prior on other images: lower rate, short warm-up",
        PriorRun(
            num_steps=500,
            batch_size=16,
            ema_decay=0.995,
            optim=OptimConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=20, final_ratio=0.05),
        ),
    ),
}

DISTILL_PRESETS: dict[str, Preset[DistillRun]] = {
    "distill-small": Preset(
        "a student of a small model on a laptop: a few minutes on two cores",
        DistillRun(
            num_steps=300,
            batch_size=16,
            ema_decay=0.99,
            num_views=6,
            validate_every=100,
            preview_every=150,
            optim=OptimConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=20, final_ratio=0.02),
        ),
    ),
    "distill-256": Preset(
        "a student of a published-size model at 256 px; the paper gives no recipe, this one has not been run",
        DistillRun(
            num_steps=20 * IMAGENET_IMAGES // 768,
            batch_size=768,
            ema_decay=0.9999,
            num_views=1,
            validate_every=1000,
            preview_every=5000,
            save_every=1000,
            augment=AugmentConfig(resize_ratio=1.125, flip=False),
            optim=OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=500, final_ratio=0.1),
        ),
    ),
}


tokenizer_preset = partial(preset_run, TOKENIZER_PRESETS, "tokenizer")
prior_preset = partial(preset_run, PRIOR_PRESETS, "prior")
distill_preset = partial(preset_run, DISTILL_PRESETS, "distillation")


def default_tokenizer_preset(image_size: int | None) -> str:
    """The preset that makes images of this size where none is named; UserError where there is none."""
    by_size = {32: "small-32", 64: "small-64", 256: "vqvae-256"}
    if image_size is not None and image_size not in by_size:
        raise UserError(
            f"no preset makes images of {image_size} px ({', '.join(map(str, by_size))} have one). Name a --preset and "
            "set --model.scale-sizes so that its last side times the stride is the image size."
        )
    return by_size[image_size or 32]


def describe_folder(folder: Path) -> tuple[dict[str, str], int]:
    """What `isthmus info` says of a saved pipeline that only this family has, and its number of classes."""
    tokenizer, prior = (read_config(folder / name) for name in ("image_tokenizer", "transformer"))
    # folders saved before it existed know nothing of folded pixels
    stride = tokenizer.get("pixel_unshuffle", 1) * 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    sizes = prior["scale_sizes"]
    rows = {
        "model": f"NextScalePipeline, {prior['scale_attention']} over scales",
        "image size": f"{tokenizer['scale_sizes'][-1] * stride} px (stride {stride})",
        "scales": f"{', '.join(map(str, sizes))} ({sum(s * s for s in sizes)} tokens)",
        "codebook": f"{tokenizer['codebook_size']} codes of width {tokenizer['codebook_dim']}",
        "transformer": f"width {prior['width']}, {prior['num_layers']} layers, {prior['num_heads']} heads",
    }
    if prior.get("text_pooled_width") is not None:
        rows["text_encoder"] = _describe_text_encoder(folder / "text_encoder")
    return rows, prior["num_classes"]


def _describe_text_encoder(folder: Path) -> str:
    if not folder.is_dir():
        return "left out: what it made of prompts is passed as text"
    settings = read_config(folder)
    networks = [network["class"] for network in settings.get("networks", ())]
    name = settings["_class_name"] + (f" ({', '.join(networks)})" if networks else "")
    return f"{name}, reads {settings['max_length']} words"
