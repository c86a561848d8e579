"""Train a diffusion tokenizer and its pixel decoder on images (`isthmus train tokenizer --preset dar-small-32`)."""

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.files import alone_in
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.models.perceptual import perceptual_distance
from isthmus.schedulers.flow_matching import FlowMatchingScheduler
from isthmus.training.checkpoints import resume, save_checkpoint
from isthmus.training.config import LAST_REVIVAL
from isthmus.training.dar_config import DiffusionTokenizerRun
from isthmus.training.dar_export import TokenizerParts, averaged_parts, export_parts
from isthmus.training.dar_measures import (
    DiffusionTokenizerScores,
    diffusion_tokenizer_scores,
    group_counts,
    group_usage,
)
from isthmus.training.dar_networks import build_networks
from isthmus.training.dar_previews import decoding, save_decodes
from isthmus.training.diffusion_losses import diffusion_losses
from isthmus.training.ema import ExponentialMovingAverage
from isthmus.training.flow_draws import raw_times, training_noise
from isthmus.training.frozen_features import frozen_features
from isthmus.training.images import first_images, image_batches, open_splits, stream_states
from isthmus.training.optim import adamw, set_rates
from isthmus.training.run import (
    FiniteGuard,
    Log,
    Progress,
    StepMeans,
    StopRequest,
    clip_gradients,
    close_trackers,
    display,
    start_run,
    write_record,
)
from isthmus.training.unit_codebook import codebook_weight, initialize_unit_codebook, revive_unit_codes
from isthmus.training.usage import CodebookUsage

logger = logging.getLogger("isthmus")

# images the codebook starts from
_CODEBOOK_IMAGES = 512
_CODEBOOK = "image_tokenizer.codebook.weight"


@alone_in("run.out")
def train_diffusion_tokenizer(run: DiffusionTokenizerRun) -> Path:
    """Train until `num_steps`, continuing where an earlier call stopped; returns the run's folder.

    Raises:
        UserError: data, folder and model do not fit each other (before anything is trained), or a loss is not finite.
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    accelerator = start_run(run, find_unused_parameters=True)
    bare = build_networks(run).to(accelerator.device)
    tokenizer, scheduler = bare.image_tokenizer, bare.scheduler
    image_size = tokenizer.config["image_size"]
    train, held_out = open_splits(run, image_size)
    write_record(accelerator, run, data_fingerprint=train.fingerprint)

    model, optimizer = accelerator.prepare(bare, adamw(bare, run.optim))
    distance, teacher = frozen_networks(run, accelerator.device)
    ema = ExponentialMovingAverage(bare, run.ema_decay)
    usage = group_usage(tokenizer)
    progress, log = Progress(num_steps=run.num_steps), Log(accelerator, run.out / "log.jsonl")
    if (extras := resume(accelerator, ema, progress, run.out)) is not None:
        usage.load_state_dict(extras)
    log.rewind(progress.step)
    batches = image_batches(
        run,
        train,
        image_size=image_size,
        step=progress.step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        stream_states=progress.stream_states,
    )
    guard, bar = FiniteGuard(accelerator.device), display(accelerator, run, progress, "tokenizer")
    model.train()
    if run.freeze_encoder and tokenizer.latent_batch_norm is not None:
        # its running statistics are no parameters, and they decide about token ids as weights do
        tokenizer.latent_batch_norm.eval()

    with StopRequest() as stop, bar:
        while progress.step < run.num_steps and not stop.agreed(accelerator):
            rate = set_rates(optimizer, progress.step, run.optim, run.num_steps)
            warm = bool(run.from_model) or progress.step >= run.continuous_steps
            quantize = warm and tokenizer.codebook is not None
            if quantize and not run.from_model and progress.step == run.continuous_steps > 0:
                start_codebook(run, tokenizer, train, ema)

            parts = list(islice(batches, run.accumulate))
            raw_t = [draw_times(run, scheduler, part["position"]).to(accelerator.device) for part in parts]
            counted = mean_counted_tokens(accelerator, scheduler, raw_t)
            counts, means = torch.zeros_like(usage.hits()), StepMeans()
            for part, times in zip(parts, raw_t, strict=True):
                images = part["image"].to(accelerator.device)
                noise = training_noise(
                    part["position"],
                    run.loss.noise_levels,
                    (image_size, image_size),
                    seed=run.seed,
                    device=accelerator.device,
                )
                with accelerator.accumulate(model):
                    output = model(images, times, noise, quantize=quantize)
                    losses = diffusion_losses(
                        output,
                        images,
                        run.loss,
                        data_std=scheduler.config["data_std"],
                        counted_tokens=counted,
                        distance=distance,
                        teacher=teacher,
                    )
                    total = torch.stack([losses[name] for name in losses if name.startswith("weighted/")]).sum()
                    accelerator.backward(total)
                    if accelerator.sync_gradients:
                        grad_norm = clip_gradients(accelerator, model, run.optim.max_grad_norm)
                        guard.watch(grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if output.token_ids is not None:
                    counts += group_counts(tokenizer, output.token_ids)
                guard.watch(total)
                means.add(losses | {"loss": total})

            progress.step += 1
            progress.images += run.batch_size
            ema.update(bare)
            if quantize:
                usage.update(cast(Tensor, accelerator.reduce(counts, "sum")))
                if run.revive_every and not run.freeze_encoder and progress.step % run.revive_every == 0:
                    latents = cast(Tensor, accelerator.gather(output.latents.detach()))
                    revive(run, tokenizer, usage, latents, ema, progress)
            bar.update()

            if progress.due(run.log_every):
                guard.check(run, progress.step)
                values = step_values(means.over_processes(accelerator), usage if quantize else None)
                log.write(progress, values | {"train/learning_rate": rate, "train/grad_norm": grad_norm.item()})
                bar.measured({"loss": f"{values['train/loss']:.3f}"}, images=progress.images)
            if (progress.due(run.validate_every) or progress.due(run.preview_every)) and accelerator.is_main_process:
                averaged, views = averaged_parts(bare, ema), EvaluationImages(held_out, image_size)
                if progress.due(run.validate_every):
                    scores = measure(run, averaged, views, quantize)
                    log.write(progress, scores.as_floats())
                    warn_of_collapse(run, scores, quantize)
                if progress.due(run.preview_every):
                    save_decodes(averaged, views, run.out / "previews", progress.step, quantize=quantize)
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
    folder = export_parts(accelerator, averaged_parts(bare, ema), run, train)
    close_trackers(accelerator)
    return folder


def frozen_networks(run: DiffusionTokenizerRun, device: torch.device) -> tuple[nn.Module | None, nn.Module | None]:
    """Perceptual distance and alignment features, each where it has a weight."""
    loss = run.loss
    distance = teacher = None
    if loss.perceptual:
        taps = {"taps": loss.perceptual_taps} if loss.perceptual_network == "lite0" else {}
        distance = perceptual_distance(loss.perceptual_network, lpips_weights=loss.lpips_weights, **taps).to(device)
    if loss.alignment:
        teacher = frozen_features(loss).to(device)
    return distance, teacher


def draw_times(run: DiffusionTokenizerRun, scheduler: FlowMatchingScheduler, positions: Tensor) -> Tensor:
    """Raw times (b, k) of training positions."""
    return raw_times(
        positions,
        run.loss.noise_levels,
        kind=run.loss.times,
        num_groups=scheduler.config["num_groups"],
        latest=run.loss.latest_time,
        seed=run.seed,
    )


def mean_counted_tokens(
    accelerator: Accelerator, scheduler: FlowMatchingScheduler, raw_t: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """Tokens that the codebook errors count, mean over the parts of the batch and all processes."""
    ends = torch.cat([scheduler.window_of(times.flatten()) for times in raw_t]) + scheduler.tokens_per_step
    return cast(Tensor, accelerator.reduce(ends.sum().float() / len(raw_t), "mean"))


def start_codebook(
    run: DiffusionTokenizerRun,
    tokenizer: DiffusionTokenizer,
    source: ImageSource | ImageStream,
    ema: ExponentialMovingAverage,
) -> None:
    """K-means start of the codebook, the same in every process."""
    images = first_images(run, source, image_size=tokenizer.config["image_size"], count=_CODEBOOK_IMAGES)
    initialize_unit_codebook(tokenizer, images.to(tokenizer.device), seed=run.seed)
    weight = codebook_weight(tokenizer)
    # sums on a GPU may differ between processes, and nothing later would bring the copies together again
    broadcast(weight.data)
    ema.restart(_CODEBOOK, weight)


def revive(
    run: DiffusionTokenizerRun,
    tokenizer: DiffusionTokenizer,
    usage: CodebookUsage,
    latents: Tensor,
    ema: ExponentialMovingAverage,
    progress: Progress,
) -> None:
    """Move dead codes onto latents of the whole batch (its last part), in every process alike."""
    if progress.step > LAST_REVIVAL * run.num_steps:
        return
    dead = ~usage.used().any(dim=0)
    moved = revive_unit_codes(tokenizer, dead, latents, seed=run.seed, step=progress.step)
    if moved:
        weight = codebook_weight(tokenizer)
        broadcast(weight.data)
        ema.restart(_CODEBOOK, weight, rows=dead)
        logger.info("step %d: revived %d of %d codes", progress.step, moved, len(dead))


def step_values(means: dict[str, Tensor], usage: CodebookUsage | None) -> dict[str, float]:
    """What one log line of training says of losses and codes; `usage` None while there is no quantisation."""
    values = {f"train/{name}": value.item() for name, value in means.items()}
    if usage is not None:
        values["train/usage"] = float(usage.used().any(dim=0).float().mean())
        values |= {f"train/perplexity_group{k}": float(v) for k, v in enumerate(usage.perplexity())}
    return values


def measure(
    run: DiffusionTokenizerRun, parts: TokenizerParts, views: EvaluationImages, quantize: bool
) -> DiffusionTokenizerScores:
    """Scores on held-out images, decoded with the solver that the saved model will have."""
    return diffusion_tokenizer_scores(
        parts.image_tokenizer, decoding(parts), views, limit=run.validation_images, quantize=quantize
    )


def warn_of_collapse(run: DiffusionTokenizerRun, scores: DiffusionTokenizerScores, quantize: bool) -> None:
    """Say in words when the decoder does not listen to the codes, or held-out images use too few of them."""
    if scores.gap < run.gap_warning:
        logger.warning(
            "an image's own codes decode %.2f dB better than another image's (threshold %.2f dB): the decoder hardly "
            "listens to the codes, whatever the flow loss says. Try more steps, --loss.jump, --loss.readout, more "
            "--loss.noise-levels or --loss.times balanced.",
            scores.gap,
            run.gap_warning,
        )
    if quantize and scores.usage < run.usage_warning:
        logger.warning(
            "held-out images use %.0f %% of the codes (threshold %.0f %%): the codebook is collapsing. Try more "
            "--continuous-steps, a smaller --revive-every or a smaller --model.codebook-size.",
            100 * scores.usage,
            100 * run.usage_warning,
        )
