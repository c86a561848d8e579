"""What trains a multi-scale tokenizer: losses, optional patch GAN, measures, codes.

The discriminator judges overlapping patches (Isola et al., 2017). The weight of the generator's loss is the ratio of
the two gradients' norms at the decoder's last weight (Esser et al., 2021), so that neither drowns the other, times a
factor that starts late and warms up, since a decoder that cannot draw yet learns nothing from being judged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource, ImageStream
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.pyramid import area_downsample
from isthmus.next_scale.runs import TokenizerLoss, TokenizerRun
from isthmus.next_scale.tokenizer import MultiScaleVQVAE, MultiScaleVQVAEOutput, cpu_layout
from isthmus.nn.draws import KMEANS, REVIVE, stream
from isthmus.nn.perceptual import psnr
from isthmus.nn.quantization import k_means
from isthmus.nn.saved_model import without_values
from isthmus.nn.shapes import FeatureMap, Images, LatentMap, ScaleTokens, TokenPyramid
from isthmus.pictures import spread
from isthmus.published import perceptual_distance
from isthmus.training.arguments import given
from isthmus.training.codebook import code_counts, perplexity
from isthmus.training.config import OptimConfig
from isthmus.training.cost import report, training_cost
from isthmus.training.optim import ExponentialMovingAverage, adamw, set_rates
from isthmus.training.previews import preview_images, save_reconstructions
from isthmus.training.saved_networks import (
    TOKENIZER_FOLDER,
    averaged_model,
    export_tokenizer,
    load_model,
    refuse_contradictions,
)
from isthmus.training.train_tokenizer import TokenizerLosses, TokenizerTask

_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Convolutions: one logit per patch of the image, high for real.

    GroupNorm instead of BatchNorm: an image's verdict depends on no other image, so neither the batch nor the number of
    processes matters, and the generator's pass cannot shift any statistics.

    `base_channels` (a multiple of 8) come out of the first convolution, twice and four times as many of the next ones.
    A patch is 26 pixels wide.
    """

    def __init__(self, *, base_channels: int):
        super().__init__()
        if base_channels % _GROUPS:
            raise UserError(
                f"loss.discriminator_channels must be a multiple of {_GROUPS}, got {base_channels}. Try 32."
            )
        first, second, third = base_channels, 2 * base_channels, 4 * base_channels
        self.layers = nn.Sequential(
            nn.Conv2d(3, first, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(first, second, 4, 2, 1, bias=False),
            nn.GroupNorm(_GROUPS, second),
            nn.LeakyReLU(0.2),
            # stride 1: widens the patch without thinning out the verdicts
            nn.Conv2d(second, third, 3, 1, 1, bias=False),
            nn.GroupNorm(_GROUPS, third),
            nn.LeakyReLU(0.2),
            nn.Conv2d(third, 1, 3, 1, 1),
        )

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 rows columns"]:
        """Logits per patch of images in [-1, 1]; a quarter as many rows and columns."""
        return self.layers(images)


def discriminator_hinge_loss(
    real_logits: Float[Tensor, "b 1 h w"], fake_logits: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, ""]:
    """Hinge loss mean relu(1 - real) + mean relu(1 + fake): 2 where undecided, 0 once both margins are kept."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def generator_hinge_loss(fake_logits: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Hinge loss -mean fake: what the generator lowers by being taken for real."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    generator_loss: Float[Tensor, ""],
    last_weight: Float[Tensor, "..."],
    *,
    average: Callable[[Tensor], Tensor] = torch.Tensor.detach,
) -> Float[Tensor, ""]:
    """||grad of reconstruction|| / (||grad of generator loss|| + 1e-6) at the decoder's last weight, 0.015 to 10,000.

    Both losses must depend on `last_weight`, and their graphs stay alive. No gradient flows through the result.
    `average` turns a gradient of this process into the mean over all processes, so that every process uses the weight
    of the global batch. The weight must be whole (single process or DDP), not a shard.
    """
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    (judged,) = torch.autograd.grad(generator_loss, last_weight, retain_graph=True)
    ratio = average(wanted).norm() / (average(judged).norm() + 1e-6)
    return ratio.clamp(0.015, 1e4).detach()


def warm_up_factor(step: int, *, start: int, warm_up_steps: int) -> float:
    """Share of the generator loss at a step: 0 before `start`, then rising evenly to 1 within `warm_up_steps`.

    >>> [warm_up_factor(step, start=10, warm_up_steps=4) for step in (0, 9, 10, 11, 13, 500)]
    [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    """
    return min(max((step - start + 1) / max(warm_up_steps, 1), 0.0), 1.0)


def reconstruction_losses(
    output: MultiScaleVQVAEOutput,
    images: Images,
    distance: nn.Module | None,
    config: TokenizerLoss,
    *,
    commitment_weight: float,
) -> dict[str, Tensor]:
    """Losses of the autoencoder; those under `weighted/` add up to what is minimised."""
    pixels = output.images.float()
    l1, mse = F.l1_loss(pixels, images), F.mse_loss(pixels, images)
    losses = {
        "l1": l1,
        "mse": mse,
        "codebook": output.codebook_loss,
        "commitment": output.commitment_loss,
        "weighted/pixels": config.l1 * l1 + config.mse * mse,
    }
    if distance is not None:
        losses["perceptual"] = distance(pixels, images).mean()
        losses["weighted/pixels"] = losses["weighted/pixels"] + config.perceptual * losses["perceptual"]
    if output.token_ids:
        codebook = output.codebook_loss + commitment_weight * output.commitment_loss
        losses["weighted/codebook"] = config.codebook * codebook
    return losses


class Discriminator:
    """The patch discriminator with its optimizer; from the step `start` on it trains, and judges."""

    def __init__(self, run: TokenizerRun, accelerator: Accelerator):
        loss = run.loss
        self.run, self.accelerator = run, accelerator
        self.start = round(loss.adversarial_start * run.num_steps)
        self._warm_up_steps = round(loss.adversarial_warmup * run.num_steps)
        self.optim = OptimConfig(
            learning_rate=loss.discriminator_learning_rate, beta1=0.5, beta2=0.9, weight_decay=5e-4, warmup_steps=0
        )
        self.network = PatchDiscriminator(base_channels=loss.discriminator_channels)

    def prepare(self) -> None:
        """Hand network and optimizer to accelerate."""
        self.network, self.optimizer = self.accelerator.prepare(self.network, adamw(self.network, self.optim))

    def generator_losses(
        self, pixels: Float[Tensor, ""], fake: Images, last_weight: Float[Tensor, "..."], step: int
    ) -> dict[str, Tensor]:
        """What is asked of the decoder, weighed against the loss of `pixels` at its `last_weight`; nothing at first."""
        factor = warm_up_factor(step, start=self.start, warm_up_steps=self._warm_up_steps)
        if factor == 0:
            return {}
        judge = self.accelerator.unwrap_model(self.network)
        judge.requires_grad_(False)
        loss = generator_hinge_loss(judge(fake.float()))
        judge.requires_grad_(True)
        average: Any = partial(self.accelerator.reduce, reduction="mean")
        weight = adaptive_weight(pixels, loss, last_weight, average=average)
        return {
            "generator": loss,
            "adversarial_weight": weight,
            "weighted/generator": self.run.loss.adversarial * factor * weight * loss,
        }

    def step(self, real: Images, fake: Images, step: int) -> dict[str, Tensor]:
        """One step, on a part that the tokenizer has just seen; nothing before `start`."""
        if step < self.start:
            return {}
        accelerator = self.accelerator
        set_rates(self.optimizer, step - self.start, self.optim, max(self.run.num_steps - self.start, 1))
        # `accumulate` counts its calls; this one is about the part that the last one was about
        accelerator.step -= 1
        with accelerator.accumulate(self.network):
            logits = self.network(torch.cat([real, fake.float()]))
            loss = discriminator_hinge_loss(*logits.chunk(2))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.network.parameters(), self.run.optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"discriminator": loss.detach()}


@torch.no_grad()
def tokenizer_scores(
    tokenizer: MultiScaleVQVAE, views: EvaluationImages, *, limit: int = 1024, quantize: bool = True
) -> dict[str, float]:
    """PSNR of reconstructions (dB), usage and perplexity of `limit` images, evenly spread over all; for a log line.

    By scale: the reconstruction from scales 0..k, of at most 64 images, and the codes of scale k. Without `quantize`,
    before there is a codebook, the decoder sees the latents: there is neither usage nor anything by scale.
    """
    chosen, device = spread(len(views), limit), tokenizer.device
    starts = range(0, len(chosen), 32)
    shown = {starts[i] for i in spread(len(starts), 2)}
    counts = torch.zeros(tokenizer.schedule.num_scales, tokenizer.codebook.num_embeddings)
    whole, by_scale = [], []
    for start in starts:
        images = views.batch(chosen[start : start + 32])["image"].to(device)
        if not quantize:
            whole.append(psnr(tokenizer.decode_features(tokenizer.latents(images)), images))
            continue
        token_ids = tokenizer.encode(images).token_ids
        counts += code_counts(token_ids, tokenizer.codebook.num_embeddings).cpu()
        whole.append(psnr(tokenizer.decode(token_ids), images))
        if start in shown:
            # one reconstruction at a time: all of a large image would not fit
            parts = (tokenizer.decode_features(scale.features) for scale in tokenizer.token_scales(token_ids))
            by_scale.append(torch.stack([psnr(part, images) for part in parts], dim=1))
    values = {"val/psnr": float(torch.cat(whole).mean())}
    if not quantize:
        return values
    values["val/usage"] = float((counts.sum(dim=0) > 0).float().mean())
    rows = {"psnr": torch.cat(by_scale).mean(dim=0), "usage": (counts > 0).float().mean(dim=1)}
    rows["perplexity"] = perplexity(counts)
    return values | {f"val/{name}_scale{k}": v for name, row in rows.items() for k, v in enumerate(row.tolist())}


def stages(tokenizer: MultiScaleVQVAE, token_ids: TokenPyramid) -> dict[str, Images]:
    """What the scales 0..k add up to, by the side of scale k."""
    scales = zip(tokenizer.schedule.sizes, tokenizer.token_scales(token_ids), strict=True)
    return {f"{side} x {side}": tokenizer.decode_features(scale.features) for side, scale in scales}


@torch.no_grad()
def residual_vectors(model: MultiScaleVQVAE, latents: LatentMap, *, exact: bool) -> list[Float[Tensor, "n d"]]:
    """What each scale has to code: its residuals, one tensor (b * s_k * s_k, d) per scale.

    `exact` follows a codebook without error (there is none yet); otherwise the present codebook's residuals.
    """
    collected: list[Tensor] = []

    def choose(scale: int, features: LatentMap) -> tuple[ScaleTokens, FeatureMap]:
        residual = area_downsample(latents - features, model.schedule.sizes[scale])
        collected.append(residual.permute(0, 2, 3, 1).flatten(0, 2))
        if exact:
            return torch.zeros(len(latents), residual.shape[-1] ** 2, dtype=torch.long), residual
        token_ids = searched[scale]
        return token_ids, model.lookup(token_ids)

    searched = [] if exact else model.requantize(latents)
    for _ in model.residual_scales(choose, latents):
        pass
    return collected


@torch.no_grad()
def first_codes(model: MultiScaleVQVAE, images: Images, *, seed: int) -> Float[Tensor, "k d"]:
    """A codebook from the encoder's outputs on `images`: k-means over the residuals of all scales.

    Fine scales have most of the tokens; each scale enters with the square root of its share, so that the few coarse
    tokens, which decide about the whole image, get codes as well.
    """
    latents = torch.cat([model.latents(part) for part in images.split(64)]).float()
    per_scale = residual_vectors(model, latents, exact=True)
    weights = np.sqrt([len(rows) for rows in per_scale])
    budget = min(sum(len(rows) for rows in per_scale), 40 * model.codebook.num_embeddings)
    generator = stream(seed, KMEANS, 1)
    picked = []
    for rows, share in zip(per_scale, weights / weights.sum(), strict=True):
        wanted = min(len(rows), max(1, int(budget * share)))
        picked.append(rows[torch.from_numpy(generator.permutation(len(rows))[:wanted])])
    return k_means(torch.cat(picked), model.codebook.num_embeddings, seed=seed)


def random_residuals(
    model: MultiScaleVQVAE, latents: LatentMap, count: int, *, seed: int, step: int
) -> Float[Tensor, "n d"]:
    """`count` residuals of these latents, of every scale as likely."""
    generator = stream(seed, REVIVE, step)
    per_scale = residual_vectors(model, latents.float(), exact=False)
    scales = generator.integers(len(per_scale), size=count)
    return torch.stack([per_scale[k][generator.integers(len(per_scale[k]))] for k in scales])


@torch.no_grad()
def save_previews(
    tokenizer: MultiScaleVQVAE, views: EvaluationImages, folder: Path, step: int, *, quantize: bool = True
) -> Path:
    """Rows = held-out images; columns = scales 0..k added up (or the decoded latents), the image itself last."""
    images, _ = preview_images(views)
    images = images.to(tokenizer.device)
    if quantize:
        shown = stages(tokenizer, tokenizer.encode(images).token_ids)
    else:
        shown = {"decoded": tokenizer.decode_features(tokenizer.latents(images))}
    return save_reconstructions(shown, images, folder, step)


@dataclass(kw_only=True)
class MultiScaleLosses(TokenizerLosses):
    """What one part of a batch gave; `reconstructed` are the decoder's images of its `images`."""

    images: Images
    reconstructed: Images


class MultiScaleTokenizerTask(TokenizerTask):
    """`MultiScaleVQVAE`, as the training loop asks for it."""

    level = "scale"
    codebook = "codebook.weight"

    def __init__(self, run: TokenizerRun, accelerator: Accelerator):
        self.run, self._accelerator = run, accelerator
        network, device = build_tokenizer(run), accelerator.device
        products = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self._layout = cpu_layout(products, network.image_size) if device.type == "cpu" else torch.channels_last
        network = network.to(device, memory_format=self._layout)  # pyright: ignore[reportCallIssue]  torch's overloads miss it
        self.network: MultiScaleVQVAE = network.train()
        self.image_size = network.image_size
        self.codebook_size, self.num_levels = network.codebook.num_embeddings, network.schedule.num_scales
        self.starts_codebook_at = None if run.from_model else run.continuous_steps
        self._discriminator = Discriminator(run, accelerator) if run.loss.adversarial else None
        self._distance = None
        if run.loss.perceptual:
            distance = perceptual_distance(run.loss.perceptual_network, lpips_weights=run.loss.lpips_weights)
            self._distance = distance.to(device)

    @staticmethod
    def describe(run: TokenizerRun) -> str:
        """Settings, size, cost and memory of a run. No weight is allocated."""
        with without_values():
            model = build_tokenizer(run)
        side = model.image_size
        # without the search for codes, a few percent
        cost = training_cost(model, lambda network: network(torch.zeros(1, 3, side, side), quantize=False))
        return report(run, f"scales {', '.join(map(str, model.schedule.sizes))}; images of {side} px", cost)

    def prepare_others(self) -> None:
        """The discriminator."""
        if self._discriminator:
            self._discriminator.prepare()

    def losses(self, model: nn.Module, batch: Batch, drawn: None, *, step: int, quantize: bool) -> MultiScaleLosses:
        """Losses of one part of a batch, the discriminator's wish among them."""
        images = batch["image"].to(self._accelerator.device, memory_format=self._layout)
        output = model(images, quantize=quantize)
        weight = self.network.config["commitment_weight"]
        named = reconstruction_losses(output, images, self._distance, self.run.loss, commitment_weight=weight)
        if self._discriminator:
            last = self.network.decoder.conv_out.weight
            named |= self._discriminator.generator_losses(named["weighted/pixels"], output.images, last, step)
        pixels = output.images.detach()
        return MultiScaleLosses(
            named=named, token_ids=output.token_ids, latents=output.latents, images=images, reconstructed=pixels
        )

    def train_others(self, losses: MultiScaleLosses, step: int) -> dict[str, Tensor]:
        """A step of the discriminator on the same part."""
        return self._discriminator.step(losses.images, losses.reconstructed, step) if self._discriminator else {}

    def first_codes(self, images: Images) -> Float[Tensor, "k d"]:
        """K-means over the residuals of all scales."""
        return first_codes(self.network, images, seed=self.run.seed)

    def new_codes(self, latents: LatentMap, count: int, step: int) -> Float[Tensor, "n d"]:
        """Residuals of these latents."""
        return random_residuals(self.network, latents, count, seed=self.run.seed, step=step)

    def averaged(self, ema: ExponentialMovingAverage) -> MultiScaleVQVAE:
        """A copy of the tokenizer that holds the averages."""
        return averaged_model(self.network, ema)

    def measure(self, model: MultiScaleVQVAE, views: EvaluationImages, *, quantize: bool) -> dict[str, float]:
        """PSNR, usage and perplexity, also by scale."""
        return tokenizer_scores(model, views, quantize=quantize)

    def save_previews(
        self, model: MultiScaleVQVAE, views: EvaluationImages, folder: Path, step: int, *, quantize: bool
    ) -> None:
        """Held-out images, scale by scale."""
        save_previews(model, views, folder, step, quantize=quantize)

    def export(self, model: MultiScaleVQVAE, source: ImageSource | ImageStream) -> Path:
        """Write the tokenizer into the run's folder."""
        plain = model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        return export_tokenizer(self._accelerator, self.run, source, {TOKENIZER_FOLDER: plain})


def load_tokenizer(path: str) -> MultiScaleVQVAE:
    """The tokenizer in a run folder, a pipeline folder, or a tokenizer folder, or of a hub model; UserError if none."""
    folder = Path(path)
    if not folder.exists():
        # a hub id brings a whole pipeline
        return load_model(path, NextScalePipeline).image_tokenizer
    if (folder / TOKENIZER_FOLDER).is_dir():
        folder = folder / TOKENIZER_FOLDER
    if not (folder / "config.json").is_file():
        raise UserError(
            f"a tokenizer is the folder of a finished `isthmus train tokenizer` (or of a pipeline), got {path}, which "
            f"holds no {TOKENIZER_FOLDER}. Finish the run first: the same command continues it."
        )
    return MultiScaleVQVAE.from_pretrained(folder)


def build_tokenizer(run: TokenizerRun) -> MultiScaleVQVAE:
    """The network of a run: new, or a saved one; UserError where arguments contradict it, or the image size."""
    wanted = given(run.model)
    if run.from_model:
        model = load_tokenizer(run.from_model)
        refuse_contradictions(model.config, wanted, run.from_model)
    else:
        model = MultiScaleVQVAE(**wanted)
    if run.image_size is not None and run.image_size != model.image_size:
        raise UserError(
            f"image_size must be the latent grid times the stride = {model.schedule.grid} x {model.stride} = "
            f"{model.image_size}, got {run.image_size}. Choose a preset of that size, or end model.scale_sizes at "
            f"image_size / {model.stride}."
        )
    if run.freeze_encoder:
        for part in (model.encoder, model.quant_conv, model.codebook, model.phi):
            part.requires_grad_(False)
    return model
