"""Train a multi-scale tokenizer on images (`isthmus train tokenizer`): losses, optional patch GAN, codebook care,
loop.

The discriminator judges overlapping patches (Isola et al., 2017). The weight of the generator's loss is the ratio of
the two gradients' norms at the decoder's last weight (Esser et al., 2021), so that neither drowns the other, times a
factor that starts late and warms up, since a decoder that cannot draw yet learns nothing from a critic.

A codebook that starts at random before the encoder has learnt anything is used by a few codes only and stays so. Here
the encoder first trains without quantisation, the codebook then starts from what it puts out (k-means over all scales),
and codes that fall out of use are moved to residuals of current images.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from isthmus.data.batches import EvaluationImages
from isthmus.data.huggingface import ImageStream
from isthmus.data.source import ImageSource
from isthmus.data.views import Sample
from isthmus.errors import UserError
from isthmus.files import alone_in
from isthmus.next_scale.export import export_tokenizer, load_tokenizer, save_reconstructions
from isthmus.next_scale.pyramid import area_downsample
from isthmus.next_scale.runs import TokenizerLoss, TokenizerRun
from isthmus.next_scale.tokenizer import MultiScaleVQVAE, MultiScaleVQVAEOutput, cpu_layout
from isthmus.nn.draws import KMEANS, REVIVE, stream
from isthmus.nn.perceptual import perceptual_distance, psnr
from isthmus.nn.quantization import k_means
from isthmus.nn.saved_model import without_values
from isthmus.nn.shapes import FeatureMap, Images, LatentMap, ScaleTokens
from isthmus.pictures import spread
from isthmus.training.checkpoints import Progress, resume, save_checkpoint
from isthmus.training.codebook import CodebookUsage, code_counts
from isthmus.training.config import LAST_REVIVAL, OptimConfig
from isthmus.training.cost import report, training_cost
from isthmus.training.images import first_images, image_batches, open_splits, stream_states
from isthmus.training.optim import ExponentialMovingAverage, adamw, set_rates
from isthmus.training.run import (
    FiniteGuard,
    Log,
    StepMeans,
    StopRequest,
    clip_gradients,
    close_trackers,
    display,
    start_run,
    write_record,
)
from isthmus.training.saved_networks import averaged_model, refuse_contradictions

_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Convolutional critic: one logit per patch of the image, high for real.

    GroupNorm instead of BatchNorm: an image's verdict depends on no other image, so neither the batch nor the number of
    processes matters, and the generator's pass cannot shift any statistics.

    ==================  ===========================================================================================
    argument            meaning
    ==================  ===========================================================================================
    `base_channels`     channels after the first convolution (a multiple of 8); doubled by each further one, at most 8 x
    `num_downsamples`   stride-2 convolutions (at least 1); a patch is 12 pixels wide for 1, 26 for 2, 54 for 3
    ==================  ===========================================================================================
    """

    def __init__(self, *, base_channels: int = 32, num_downsamples: int = 2):
        super().__init__()
        if num_downsamples < 1 or base_channels < 8 or base_channels % _GROUPS:
            raise UserError(
                f"a patch discriminator needs at least one downsampling and a multiple of {_GROUPS} channels, "
                f"got num_downsamples={num_downsamples} and base_channels={base_channels}. Try 2 and 32."
            )
        widths = [base_channels * min(2**level, 8) for level in range(num_downsamples + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after in zip(widths[:-2], widths[1:-1], strict=True):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.GroupNorm(_GROUPS, after), nn.LeakyReLU(0.2)]
        # stride 1: widens the patch without thinning out the verdicts
        layers += [
            nn.Conv2d(widths[-2], widths[-1], 3, 1, 1, bias=False),
            nn.GroupNorm(_GROUPS, widths[-1]),
            nn.LeakyReLU(0.2),
        ]
        layers.append(nn.Conv2d(widths[-1], 1, 3, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 rows columns"]:
        """Logits per patch of images in [-1, 1]; h and w are divided by 2**num_downsamples."""
        return self.layers(images)


def discriminator_hinge_loss(
    real_logits: Float[Tensor, "b 1 h w"], fake_logits: Float[Tensor, "b 1 h w"]
) -> Float[Tensor, ""]:
    """Hinge loss mean relu(1 - real) + mean relu(1 + fake): 2 for an undecided critic, 0 once both margins are kept."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def generator_hinge_loss(fake_logits: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Hinge loss -mean fake: what the generator lowers by being taken for real."""
    return -fake_logits.mean()


def _unchanged(gradient: Tensor) -> Tensor:
    return gradient


def adaptive_weight(
    reconstruction_loss: Float[Tensor, ""],
    generator_loss: Float[Tensor, ""],
    last_weight: Float[Tensor, "..."],
    *,
    low: float = 0.015,
    high: float = 1e4,
    average: Callable[[Tensor], Tensor] = _unchanged,
) -> Float[Tensor, ""]:
    """||grad of reconstruction|| / (||grad of generator loss|| + 1e-6) at the decoder's last weight, in [low, high].

    Both losses must depend on `last_weight`, and their graphs stay alive. No gradient flows through the result.
    `average` turns a gradient of this process into the mean over all processes, so that every process uses the weight
    of the global batch. The weight must be whole (single process or DDP), not a shard.
    """
    (wanted,) = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    (critic,) = torch.autograd.grad(generator_loss, last_weight, retain_graph=True)
    ratio = average(wanted).norm() / (average(critic).norm() + 1e-6)
    return ratio.clamp(low, high).detach()


def warm_up_factor(step: int, *, start: int, warm_up_steps: int) -> float:
    """Share of the generator loss at a step: 0 before `start`, then rising evenly to 1 within `warm_up_steps`.

    >>> [warm_up_factor(step, start=10, warm_up_steps=4) for step in (0, 9, 10, 11, 13, 500)]
    [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    """
    if step < start:
        return 0.0
    if warm_up_steps <= 0:
        return 1.0
    return min(1.0, (step - start + 1) / warm_up_steps)


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


@dataclass
class Critic:
    """The patch discriminator with its optimizer."""

    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    optim: OptimConfig
    start: int
    warm_up_steps: int

    @classmethod
    def of(cls, run: TokenizerRun) -> "Critic":
        """A new discriminator, which starts late: a decoder that cannot draw yet learns nothing from it."""
        discriminator = PatchDiscriminator(base_channels=run.loss.discriminator_channels)
        start = round(run.loss.adversarial_start * run.num_steps)
        optim = OptimConfig(
            learning_rate=run.loss.discriminator_learning_rate, beta1=0.5, beta2=0.9, weight_decay=5e-4, warmup_steps=0
        )
        return cls(
            discriminator, adamw(discriminator, optim), optim, start, round(run.loss.adversarial_warmup * run.num_steps)
        )

    def prepare(self, accelerator: Accelerator) -> None:
        """Hand both to accelerate."""
        self.discriminator, self.optimizer = accelerator.prepare(self.discriminator, self.optimizer)

    def generator_losses(
        self,
        accelerator: Accelerator,
        model: MultiScaleVQVAE,
        losses: dict[str, Tensor],
        fake: Images,
        run: TokenizerRun,
        step: int,
    ) -> dict[str, Tensor]:
        """What the discriminator asks of the decoder, weighted against the pixel losses; nothing before `start`."""
        factor = warm_up_factor(step, start=self.start, warm_up_steps=self.warm_up_steps)
        if factor == 0:
            return {}
        judge = accelerator.unwrap_model(self.discriminator)
        judge.requires_grad_(False)
        loss = generator_hinge_loss(judge(fake.float()))
        judge.requires_grad_(True)
        weight = adaptive_weight(
            losses["weighted/pixels"],
            loss,
            model.decoder.conv_out.weight,
            average=lambda gradient: accelerator.reduce(gradient, "mean"),  # pyright: ignore[reportArgumentType]
        )
        return {
            "generator": loss,
            "adversarial_weight": weight,
            "weighted/generator": run.loss.adversarial * factor * weight * loss,
        }

    def step(
        self, accelerator: Accelerator, real: Images, fake: Images, run: TokenizerRun, step: int
    ) -> dict[str, Tensor]:
        """One step of the discriminator; nothing before `start`."""
        if step < self.start:
            return {}
        set_rates(self.optimizer, step - self.start, self.optim, max(run.num_steps - self.start, 1))
        with accelerator.accumulate(self.discriminator):
            logits = self.discriminator(torch.cat([real, fake.float()]))
            loss = discriminator_hinge_loss(*logits.chunk(2))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.discriminator.parameters(), run.optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"discriminator": loss.detach()}


@dataclass(frozen=True)
class TokenizerScores:
    """How well a tokenizer does on images it has not seen.

    Attributes:
        num_images: images measured.
        psnr: mean over images, dB.
        psnr_by_scale: of the reconstruction from scales 0..k, mean over at most 64 of them.
        usage: share of the codebook that any scale uses.
        usage_by_scale, perplexity_by_scale: the same for every scale.
    """

    num_images: int
    psnr: float
    psnr_by_scale: list[float]
    usage: float
    usage_by_scale: list[float]
    perplexity_by_scale: list[float]

    def as_floats(self) -> dict[str, float]:
        """Flat names for a log line."""
        values = {"val/psnr": self.psnr, "val/usage": self.usage}
        for name in ("psnr", "usage", "perplexity"):
            values |= {f"val/{name}_scale{k}": v for k, v in enumerate(getattr(self, f"{name}_by_scale"))}
        return values


@torch.no_grad()
def tokenizer_scores(tokenizer: MultiScaleVQVAE, images: "Dataset[Sample]", *, limit: int = 1024) -> TokenizerScores:
    """Measure a tokenizer on `limit` images of a data set, evenly spread over it."""
    device = tokenizer.codebook.weight.device
    chosen = spread(len(images), limit)  # pyright: ignore[reportArgumentType]  map-style data sets have a length
    values, partial = [], []
    starts = range(0, len(chosen), 32)
    shown = {starts[i] for i in spread(len(starts), 2)}
    usage = CodebookUsage(tokenizer.schedule.num_scales, tokenizer.codebook.num_embeddings, decay=0.0)
    counts = torch.zeros(tokenizer.schedule.num_scales, tokenizer.codebook.num_embeddings)
    for start in starts:
        batch = _stack(images, chosen[start : start + 32]).to(device)
        token_ids = tokenizer.encode(batch).token_ids
        counts += code_counts(token_ids, tokenizer.codebook.num_embeddings).cpu()
        values.append(psnr(tokenizer.decode(token_ids), batch).cpu())
        if start in shown:
            by_scale = [
                psnr(tokenizer.decode_features(tokenizer.features_up_to(token_ids, k)), batch).cpu()
                for k in range(tokenizer.schedule.num_scales)
            ]
            partial.append(torch.stack(by_scale, dim=1))
    usage.update(counts)
    return TokenizerScores(
        num_images=len(chosen),
        psnr=float(torch.cat(values).mean()),
        psnr_by_scale=torch.cat(partial).mean(dim=0).tolist(),
        usage=float((counts.sum(dim=0) > 0).float().mean()),
        usage_by_scale=(counts > 0).float().mean(dim=1).tolist(),
        perplexity_by_scale=usage.perplexity().tolist(),
    )


def _stack(images: "Dataset[Sample]", indices: Sequence[int] | range) -> Images:
    rows = [images[i]["image"] for i in indices]
    return torch.stack([torch.as_tensor(row) for row in rows])


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
def initialize_codebook(model: MultiScaleVQVAE, images: Images, *, seed: int) -> None:
    """Start the codebook from the encoder's outputs on `images`: k-means over the residuals of all scales.

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
    model.codebook.weight.copy_(k_means(torch.cat(picked), model.codebook.num_embeddings, seed=seed))


@torch.no_grad()
def revive_codes(model: MultiScaleVQVAE, dead: Bool[Tensor, " k"], latents: LatentMap, *, seed: int, step: int) -> int:
    """Move codes that no scale uses onto residuals of the present batch; returns how many moved."""
    count = int(dead.sum())
    if not count:
        return 0
    generator = stream(seed, REVIVE, step)
    per_scale = residual_vectors(model, latents.float(), exact=False)
    scales = generator.integers(len(per_scale), size=count)
    rows = torch.stack([per_scale[k][generator.integers(len(per_scale[k]))] for k in scales])
    model.codebook.weight[dead] = rows.to(model.codebook.weight)
    return count


logger = logging.getLogger("isthmus")

# images the codebook starts from
_CODEBOOK_IMAGES = 512


@alone_in("run.out")
def train_tokenizer(run: TokenizerRun) -> Path:
    """Train until `num_steps`, continuing where an earlier call stopped; returns the folder of the tokenizer.

    Raises:
        UserError: data, folder and model do not fit each other (before anything is trained), or a loss is not finite.
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    accelerator = start_run(run, find_unused_parameters=True)
    products = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    bare = build_tokenizer(run)
    layout = cpu_layout(products, bare.image_size) if accelerator.device.type == "cpu" else torch.channels_last
    bare = bare.to(accelerator.device, memory_format=layout)  # pyright: ignore[reportCallIssue]  torch's overloads miss it
    train, held_out = open_splits(run, bare.image_size)
    write_record(accelerator, run, data_fingerprint=train.fingerprint)

    critic = Critic.of(run) if run.loss.adversarial else None
    model, optimizer = accelerator.prepare(bare, adamw(bare, run.optim))
    if critic:
        critic.prepare(accelerator)
    distance = perceptual_distance(run.loss.perceptual_network, lpips_weights=run.loss.lpips_weights)
    distance = distance.to(accelerator.device) if run.loss.perceptual else None
    ema = ExponentialMovingAverage(bare, run.ema_decay)
    usage = CodebookUsage(bare.schedule.num_scales, bare.codebook.num_embeddings, device=accelerator.device)
    progress, log = Progress(num_steps=run.num_steps), Log(accelerator, run.out / "log.jsonl")
    if (extras := resume(accelerator, ema, progress, run.out)) is not None:
        usage.load_state_dict(extras)
    log.rewind(progress.step)

    batches = image_batches(
        run,
        train,
        image_size=bare.image_size,
        step=progress.step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        stream_states=progress.stream_states,
    )
    guard, bar = FiniteGuard(accelerator.device), display(accelerator, run, progress, "tokenizer")
    model.train()

    with StopRequest() as stop, bar:
        while progress.step < run.num_steps and not stop.agreed(accelerator):
            rate = set_rates(optimizer, progress.step, run.optim, run.num_steps)
            quantize = bool(run.from_model) or progress.step >= run.continuous_steps
            if progress.step == run.continuous_steps and not run.from_model:
                start_codebook(run, bare, train, ema)

            counts, means = torch.zeros_like(usage.hits()), StepMeans()
            for part, batch in enumerate(islice(batches, run.accumulate)):
                images = batch["image"].to(accelerator.device, memory_format=layout)
                # `accumulate` counts its calls; those for model and discriminator are about the same part
                accelerator.step = part
                with accelerator.accumulate(model):
                    output = model(images, quantize=quantize)
                    losses = reconstruction_losses(
                        output, images, distance, run.loss, commitment_weight=bare.config["commitment_weight"]
                    )
                    if critic:
                        losses |= critic.generator_losses(accelerator, bare, losses, output.images, run, progress.step)
                    total = torch.stack([losses[name] for name in losses if name.startswith("weighted/")]).sum()
                    accelerator.backward(total)
                    if accelerator.sync_gradients:
                        grad_norm = clip_gradients(accelerator, model, run.optim.max_grad_norm)
                        guard.watch(grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if critic:
                    accelerator.step = part
                    losses |= critic.step(accelerator, images, output.images.detach(), run, progress.step)
                if quantize:
                    counts += code_counts(output.token_ids, bare.codebook.num_embeddings)
                guard.watch(total)
                means.add(losses | {"loss": total})

            progress.step += 1
            progress.images += run.batch_size
            ema.update(bare)
            if quantize:
                usage.update(cast(Tensor, accelerator.reduce(counts, "sum")))
                if run.revive_every and not run.freeze_encoder and progress.step % run.revive_every == 0:
                    latents = cast(Tensor, accelerator.gather(output.latents.detach()))
                    revive(run, bare, usage, latents, ema, progress)
            bar.update()

            if progress.due(run.log_every):
                guard.check(run, progress.step)
                values = step_values(means.over_processes(accelerator), usage, rate, grad_norm.item(), quantize)
                log.write(progress, values)
                bar.measured({"loss": f"{values['train/loss']:.3f}"}, images=progress.images)
            if progress.due(run.validate_every) and accelerator.is_main_process:
                averaged = averaged_model(bare, ema)
                scores = tokenizer_scores(averaged, EvaluationImages(held_out, bare.image_size))
                log.write(progress, scores.as_floats())
                warn_of_collapse(run, scores.usage, quantize)
            if progress.due(run.preview_every) and accelerator.is_main_process:
                save_reconstructions(averaged_model(bare, ema), held_out, run.out / "previews", progress.step)
            if progress.due(run.save_every):
                guard.check(run, progress.step, ema.averages.values())
                progress.stream_states = stream_states(batches)
                save_checkpoint(
                    accelerator, ema, progress, run.out, keep=run.keep_checkpoints, extras=usage.state_dict()
                )

        if progress.step < run.num_steps:
            guard.check(run, progress.step, ema.averages.values())
            progress.stream_states = stream_states(batches)
            save_checkpoint(accelerator, ema, progress, run.out, keep=run.keep_checkpoints, extras=usage.state_dict())
            raise KeyboardInterrupt
    folder = export_tokenizer(accelerator, averaged_model(bare, ema), run, train)
    close_trackers(accelerator)
    return folder


def build_tokenizer(run: TokenizerRun) -> MultiScaleVQVAE:
    """The network of a run: from a saved model, or new from the run's arguments.

    Raises:
        UserError: an argument contradicts the saved model or the image size.
    """
    wanted = {name: value for name, value in asdict(run.model).items() if value is not None}
    if run.from_model:
        model = load_tokenizer(run.from_model)
        refuse_contradictions(model, wanted, run.from_model)
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


def describe_tokenizer_run(run: TokenizerRun) -> str:
    """What the run would be: its settings as JSON, then size, cost and memory. No weight is allocated."""
    with without_values():
        model = build_tokenizer(run)
    side = model.image_size
    # without the search for codes, a few percent
    cost = training_cost(model, lambda network: network(torch.zeros(1, 3, side, side), quantize=False))
    return report(run, f"scales {', '.join(map(str, model.schedule.sizes))}; images of {side} px", cost)


def start_codebook(
    run: TokenizerRun, model: MultiScaleVQVAE, source: ImageSource | ImageStream, ema: ExponentialMovingAverage
) -> None:
    """K-means start of the codebook, the same in every process."""
    images = first_images(run, source, image_size=model.image_size, count=_CODEBOOK_IMAGES)
    initialize_codebook(model, images.to(model.codebook.weight.device), seed=run.seed)
    # sums on a GPU may differ between processes, and nothing later would bring the copies together again
    broadcast(model.codebook.weight.data)
    ema.restart("codebook.weight", model.codebook.weight)


def revive(
    run: TokenizerRun,
    model: MultiScaleVQVAE,
    usage: CodebookUsage,
    latents: Tensor,
    ema: ExponentialMovingAverage,
    progress: Progress,
) -> None:
    """Move dead codes onto residuals of the whole batch's latents (its last part), in every process alike."""
    if progress.step > LAST_REVIVAL * run.num_steps:
        return
    dead = ~usage.used().any(dim=0)
    moved = revive_codes(model, dead, latents, seed=run.seed, step=progress.step)
    if moved:
        broadcast(model.codebook.weight.data)
        ema.restart("codebook.weight", model.codebook.weight, rows=dead)
        logger.info("step %d: revived %d of %d codes", progress.step, moved, len(dead))


def step_values(
    means: dict[str, Tensor], usage: CodebookUsage, rate: float, grad_norm: float, quantize: bool
) -> dict[str, float]:
    """One log line of training."""
    values = {f"train/{name}": value.item() for name, value in means.items()}
    values |= {"train/learning_rate": rate, "train/grad_norm": grad_norm}
    if quantize:
        values["train/usage"] = float(usage.used().any(dim=0).float().mean())
        values |= {f"train/perplexity_scale{k}": float(v) for k, v in enumerate(usage.perplexity())}
    return values


def warn_of_collapse(run: TokenizerRun, usage: float, quantize: bool) -> None:
    """Say in words when held-out images use too few codes."""
    if quantize and usage < run.usage_warning:
        logger.warning(
            "held-out images use %.0f %% of the codes (threshold %.0f %%): the codebook is collapsing. Try more "
            "--continuous-steps, a smaller --revive-every or a smaller --model.codebook-size.",
            100 * usage,
            100 * run.usage_warning,
        )
