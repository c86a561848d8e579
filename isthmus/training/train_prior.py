"""Train a next-scale prior on the tokens of a frozen tokenizer (`isthmus train prior`): VAR and SRDD."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.data.batches import CachedTokens, EvaluationImages, training_batches
from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.data.token_cache import TokenCache
from isthmus.errors import UserError
from isthmus.functional.pyramid import ScaleSchedule, nats_to_bits
from isthmus.models.fingerprint import fingerprint
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.training.checkpoints import resume, save_checkpoint
from isthmus.training.config import PriorRun
from isthmus.training.ema import ExponentialMovingAverage
from isthmus.training.export import (
    averaged_model,
    export_pipeline,
    load_pair,
    load_tokenizer,
    refuse_contradictions,
    sampling_options,
)
from isthmus.training.images import cache_workers, open_splits
from isthmus.training.objectives import (
    PriorLosses,
    dropped_labels,
    next_scale_loss,
    path_factors,
    scale_subset,
    scale_weights,
    select_scales,
)
from isthmus.training.optim import adamw, set_rates
from isthmus.training.previews import save_samples
from isthmus.training.run import (
    FiniteGuard,
    Log,
    Progress,
    StepMeans,
    StopRequest,
    clip_gradients,
    close_trackers,
    progress_bar,
    start_run,
    write_record,
)
from isthmus.training.views import augmentation

logger = logging.getLogger("isthmus")

# held-out images whose likelihood is measured while training
_VALIDATION_IMAGES = 1024
# what FSDP2 gathers one by one: not whole blocks, since all modulations are computed ahead of the blocks
_SHARDED = ("BlockModulation", "MultiHeadAttention", "FeedForward")


def train_prior(run: PriorRun) -> Path:
    """Train until `num_steps`, continuing where an earlier call stopped; returns the pipeline folder.

    Raises:
        UserError: data, folder and models do not fit each other (before anything is trained), or a loss is not finite.
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    accelerator = start_run(
        run,
        # scale 0 has a table of its own, and only the others embed words
        find_unused_parameters=run.scales_per_step is not None,
        compiled=run.compile,
        sharded=_SHARDED if run.parallel == "fsdp2" else (),
    )
    tokenizer, train, held_out, bare = prepare(run)
    tokenizer = tokenizer.to(accelerator.device)
    if run.checkpoint_activations:
        bare.enable_gradient_checkpointing()
    write_record(
        accelerator,
        run,
        data_fingerprint=train.fingerprint,
        tokenizer_fingerprint=fingerprint(tokenizer),
        class_names=list(train.class_names),
    )
    with accelerator.main_process_first():
        cache = open_cache(run, tokenizer, train)
    validation = held_out_tokens(tokenizer, held_out) if accelerator.is_main_process else None

    config, schedule, rates = bare.config, tokenizer.schedule, bare.drop_path_rates
    weights = scale_weights(run.scale_loss, schedule.sizes)
    model, optimizer = accelerator.prepare(bare, adamw(bare, run.optim))
    ema = ExponentialMovingAverage(bare, run.ema_decay)
    progress, log = Progress(num_steps=run.num_steps), Log(accelerator, run.out / "log.jsonl")
    resume(accelerator, ema, progress, run.out)
    log.rewind(progress.step)
    batches = training_batches(
        CachedTokens(cache, seed=run.seed, balanced=train.balanced),
        batch_size=run.batch_size // run.accumulate,
        start_position=progress.step * run.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=0,
    )
    guard, bar = FiniteGuard(accelerator.device), progress_bar(accelerator, progress, "prior")
    logger.info("token accuracy of a few per cent is healthy on natural images; drawings reach more")
    model.train()

    with StopRequest() as stop, bar:
        while progress.step < run.num_steps and not stop.agreed(accelerator):
            rate = set_rates(optimizer, progress.step, run.optim, run.num_steps)
            scales = scale_subset(schedule.num_scales, run.scales_per_step, seed=run.seed, step=progress.step)
            means = StepMeans()

            for batch in islice(batches, run.accumulate):
                token_ids, positions = batch["token_ids"].to(accelerator.device), batch["position"]
                labels = dropped_labels(
                    batch["class_label"].to(accelerator.device),
                    positions,
                    rate=run.label_dropout,
                    null_class_id=config["num_classes"],
                    seed=run.seed,
                )
                with torch.no_grad():
                    inputs = tokenizer.scale_inputs(list(token_ids.split(list(schedule.lengths), dim=1)))
                keep = path_factors(positions, rates, seed=run.seed)
                with accelerator.accumulate(model):
                    output = model(
                        labels,
                        select_scales(inputs, schedule, scales, first=1),
                        scales=scales,
                        keep=None if keep is None else keep.to(accelerator.device),
                    )
                    targets = select_scales(token_ids, schedule, scales)
                    losses = next_scale_loss(
                        output.logits, targets, schedule, weights, scales=scales, label_smoothing=run.label_smoothing
                    )
                    accelerator.backward(losses.total)
                    if accelerator.sync_gradients:
                        grad_norm = clip_gradients(accelerator, model, run.optim.max_grad_norm)
                        guard.watch(grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                guard.watch(losses.total)
                if progress.due(run.log_every, ahead=1):
                    means.add(part_values(losses, targets))

            progress.step += 1
            progress.images += run.batch_size
            ema.update(bare)
            bar.update()

            if progress.due(run.log_every):
                guard.check(run, progress.step)
                values = step_values(means.over_processes(accelerator), schedule, scales)
                log.write(progress, values | {"train/learning_rate": rate, "train/grad_norm": grad_norm.item()})
                bar.set_postfix(bits=f"{values['train/bits_per_token']:.3f}", images=progress.images)
            if progress.due(run.validate_every) or progress.due(run.preview_every):
                averaged = averaged_model(bare, ema)
                if accelerator.is_main_process and progress.due(run.validate_every):
                    log.write(progress, held_out_bits(averaged, tokenizer, validation))
                if accelerator.is_main_process and progress.due(run.preview_every):
                    options = sampling_options(run, averaged)
                    save_samples(tokenizer, averaged, train.class_names, options, run.out / "previews", progress.step)
            if progress.due(run.save_every):
                guard.check(run, progress.step, ema.averages.values())
                save_checkpoint(accelerator, ema, progress, run.out, keep=run.keep_checkpoints)

        if progress.step < run.num_steps:
            guard.check(run, progress.step, ema.averages.values())
            save_checkpoint(accelerator, ema, progress, run.out, keep=run.keep_checkpoints)
            raise KeyboardInterrupt
    folder = export_pipeline(accelerator, tokenizer, averaged_model(bare, ema), run, train)
    close_trackers(accelerator)
    return folder


def prepare(run: PriorRun) -> tuple[MultiScaleVQVAE, ImageSource | ImageStream, ImageSource, NextScaleTransformer]:
    """Tokenizer, training images, held-out images and the prior to train: new, or from a saved model.

    Raises:
        UserError: something is missing or contradicts the saved model.
    """
    wanted = {name: value for name, value in asdict(run.model).items() if value is not None}
    if run.from_model:
        tokenizer, source_model = load_pair(run.from_model)
    elif run.tokenizer:
        tokenizer, source_model = load_tokenizer(run.tokenizer), None
    else:
        raise UserError(
            "a prior needs a tokenizer, got none. Pass --tokenizer FOLDER (of a tokenizer run) or --from MODEL."
        )
    train, held_out = open_splits(run, tokenizer.image_size)
    num_classes = len(train.class_names)
    if source_model is not None:
        return tokenizer, train, held_out, with_new_classes(source_model, num_classes, wanted, run.from_model)
    model = NextScaleTransformer(
        scale_sizes=tokenizer.schedule.sizes,
        codebook_size=tokenizer.config["codebook_size"],
        codebook_dim=tokenizer.config["codebook_dim"],
        num_classes=num_classes,
        **wanted,
    )
    if run.scales_per_step is not None and not model.is_markov:
        raise UserError(
            f"scales_per_step needs the Markov mask, where scales are independent, got {run.scales_per_step} with "
            "causal. Use --model.scale-attention markov."
        )
    return tokenizer, train, held_out, model


def with_new_classes(
    source: NextScaleTransformer, num_classes: int, wanted: dict[str, object], name: str
) -> NextScaleTransformer:
    """The saved prior with a new class table: every row starts at the null row, which is kept; all else is as it was.

    Raises:
        UserError: an argument contradicts the saved model.
    """
    refuse_contradictions(source, wanted, name)
    arguments: dict[str, Any] = {k: v for k, v in source.config.items() if not k.startswith("_")}
    arguments["num_classes"] = num_classes
    model = NextScaleTransformer(**arguments)
    state = source.state_dict()
    null_row = state["class_embedding.weight"][source.null_class_id]
    state["class_embedding.weight"] = null_row.expand(num_classes + 1, -1).clone()
    model.load_state_dict(state)
    return model


def open_cache(run: PriorRun, tokenizer: MultiScaleVQVAE, train: ImageSource | ImageStream) -> TokenCache:
    """The token cache of this run: made at the first start, opened again afterwards."""
    return TokenCache.build(
        run.out / "tokens",
        tokenizer,
        train,
        num_views=run.num_views,
        max_images=run.max_images,
        num_workers=cache_workers(run, train),
        image_size=tokenizer.image_size,
        augment=augmentation(run, train),
        seed=run.seed,
        batch_size=64,
        device=tokenizer.device,
    )


@torch.no_grad()
def held_out_tokens(tokenizer: MultiScaleVQVAE, held_out: ImageSource) -> tuple[Tensor, Tensor]:
    """Token ids (n, L) and labels (n,) of held-out images, without augmentation."""
    views = EvaluationImages(held_out, tokenizer.image_size)
    ids, labels = [], []
    for start in range(0, min(len(views), _VALIDATION_IMAGES), 64):
        rows = [views[i] for i in range(start, min(start + 64, len(views)))]
        images = torch.stack([torch.as_tensor(row["image"]) for row in rows]).to(tokenizer.device)
        ids.append(torch.cat(tokenizer.encode(images).token_ids, dim=1))
        labels += [int(row["class_label"]) for row in rows]
    return torch.cat(ids), torch.tensor(labels, device=tokenizer.device)


@torch.no_grad()
def held_out_bits(
    model: NextScaleTransformer, tokenizer: MultiScaleVQVAE, validation: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    """Bits per token of held-out images, in all and per scale."""
    assert validation is not None, "only the main process measures"
    token_ids, labels = validation
    schedule = tokenizer.schedule
    scales = range(schedule.num_scales)
    sums = torch.zeros(schedule.num_scales, device=token_ids.device)
    for ids, label in zip(token_ids.split(32), labels.split(32), strict=True):
        logits = model(label, tokenizer.scale_inputs(list(ids.split(list(schedule.lengths), dim=1)))).logits
        uniform = scale_weights("token-uniform", schedule.sizes)
        sums += next_scale_loss(logits, ids, schedule, uniform, scales=scales).by_scale * len(ids)
    by_scale = [nats_to_bits(value) for value in (sums / len(token_ids)).tolist()]
    mean = sum(bits * length for bits, length in zip(by_scale, schedule.lengths, strict=True)) / schedule.num_tokens
    return {"val/bits_per_token": mean, **{f"val/bits_scale{k}": bits for k, bits in enumerate(by_scale)}}


def part_values(losses: PriorLosses, token_ids: Tensor) -> dict[str, Tensor]:
    """What is logged of one part of a batch: loss, token accuracy, and nats per token of every scale that was run."""
    hits = losses.logits.argmax(dim=-1) == token_ids
    return {"loss": losses.total, "token_accuracy": hits.float().mean(), "nats": losses.by_scale}


def step_values(means: dict[str, Tensor], schedule: ScaleSchedule, scales: Sequence[int]) -> dict[str, float]:
    """One log line of training: the loss, bits per token of every scale and of all, token accuracy."""
    values = {f"train/{name}": means[name].item() for name in ("loss", "token_accuracy")}
    lengths = [schedule.lengths[k] for k in scales]
    bits = [nats_to_bits(nats) for nats in means["nats"].tolist()]
    values["train/bits_per_token"] = sum(b * n for b, n in zip(bits, lengths, strict=True)) / sum(lengths)
    return values | {f"train/bits_scale{k}": b for k, b in zip(scales, bits, strict=True)}
