"""Train a multi-scale tokenizer on images (`isthmus train tokenizer`)."""

import logging
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import broadcast
from torch import Tensor

from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.errors import UserError
from isthmus.files import alone_in
from isthmus.layers.convolution import cpu_layout
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.perceptual import perceptual_distance
from isthmus.models.saved_model import without_values
from isthmus.training.checkpoints import resume, save_checkpoint
from isthmus.training.codebook import initialize_codebook, revive_codes
from isthmus.training.config import LAST_REVIVAL, TokenizerRun
from isthmus.training.cost import report, training_cost
from isthmus.training.ema import ExponentialMovingAverage
from isthmus.training.export import export_tokenizer, load_tokenizer
from isthmus.training.images import first_images, image_batches, open_splits, stream_states
from isthmus.training.measures import tokenizer_scores
from isthmus.training.optim import adamw, set_rates
from isthmus.training.previews import save_reconstructions
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
from isthmus.training.saved_networks import averaged_model, refuse_contradictions
from isthmus.training.tokenizer_losses import Critic, reconstruction_losses
from isthmus.training.usage import CodebookUsage, code_counts

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
