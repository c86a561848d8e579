"""Train a prior on the tokens of a frozen tokenizer (`isthmus train prior`): VAR and SRDD, or the Llama of D-AR."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.batches import CachedTokens, EvaluationImages, training_batches
from isthmus.data.source import ImageSource, ImageStream
from isthmus.data.token_cache import TokenCache
from isthmus.data.views import Batch
from isthmus.files import alone_in
from isthmus.nn.sampling import nats_to_bits
from isthmus.nn.stored_llama import fingerprint
from isthmus.pictures import spread
from isthmus.registry import task_of
from isthmus.training.checkpoints import Progress, resume, save_checkpoint
from isthmus.training.config import TokensRun
from isthmus.training.images import augmentation, views_per_image
from isthmus.training.optim import ExponentialMovingAverage, adamw, set_rates
from isthmus.training.run import (
    FiniteGuard,
    Log,
    StopRequest,
    clip_gradients,
    display,
    means_of,
    start_run,
    write_record,
)

logger = logging.getLogger("isthmus")

# held-out images whose likelihood is measured while training
_VALIDATION_IMAGES = 1024


@runtime_checkable
class PriorLosses(Protocol):
    """What one part of a batch gave."""

    total: Tensor
    """What is minimised."""

    def logged(self) -> dict[str, Tensor]:
        """What is averaged over parts and processes for the log, without gradients."""
        ...


@runtime_checkable
class PriorTask(Protocol):
    """What a run trains: tokenizer, prior and images, and what a loss is; to derive from."""

    sharded: tuple[str, ...]
    """Names of the modules that FSDP2 gathers one by one."""
    tokenizer: Any
    """Frozen."""
    encoder: Any
    """What fills the token cache: the tokenizer, or the tokenizer under other schedules."""
    network: Any
    """The prior in training."""
    train: ImageSource | ImageStream
    held_out: ImageSource
    image_size: int
    level: Literal["scale", "group"]
    """What bits are counted by."""
    facts: Mapping[str, object] = {}
    """What run.json keeps beside the run, and a continued run must share."""

    def __init__(self, run: Any) -> None: ...

    @staticmethod
    def describe(run: Any) -> str:
        """What a run would be: settings, size, cost and memory, for a dry run. No weight is allocated."""
        ...

    @staticmethod
    def has_unused_parameters(run: Any) -> bool:
        """Whether a step may leave parameters without a gradient."""
        return False

    def with_cache(self, cache: TokenCache) -> None:
        """Take over what the cache holds beside tokens and labels, before the network is prepared: nothing."""

    def compile(self) -> None:
        """Send the blocks of the network through `torch.compile`, where the run asks for it."""

    def place(self, device: torch.device) -> None:
        """Move what is frozen, previews included, to the device of the training."""
        ...

    def regularisation(self) -> AbstractContextManager[object]:
        """What holds while training and is no part of the network: nothing."""
        return nullcontext()

    def losses(self, model: nn.Module, batch: Batch, step: int) -> PriorLosses:
        """Losses of one part of a batch, on the device of the model."""
        ...

    def lengths(self, step: int) -> dict[int, int]:
        """Tokens of every level that this step predicts, by its number."""
        ...

    def step_values(self, means: dict[str, Tensor], step: int) -> dict[str, float]:
        """One log line from the means of what is logged."""
        values = {f"train/{name}": means[name].item() for name in ("loss", "token_accuracy")}
        return values | bits_by_level("train", self.level, means["nats"], self.lengths(step))

    def averaged(self, ema: ExponentialMovingAverage) -> Any:
        """A copy of the network that holds the averages; every process must call it where weights are sharded."""
        ...

    def token_ids(self, images: Tensor) -> Tensor:
        """(n, L) token ids of images in [-1, 1]."""
        ...

    def held_out_bits(self, model: Any, token_ids: Tensor, labels: Tensor) -> dict[str, float]:
        """Bits per token of held-out images, in all and per scale or group, from token ids (n, L) and labels (n,)."""
        ...

    def held_out_captions(self, rows: slice) -> list[str]:
        """Captions of these rows of the held-out images that are measured, of data that have some."""
        assert self.held_out.captions is not None, "checked at the start"
        return [self.held_out.captions[i] for i in measured_images(self.held_out)[rows]]

    def save_samples(self, model: Any, folder: Path, step: int) -> None:
        """A picture of samples at fixed seeds."""
        ...

    def export(self, accelerator: Accelerator, model: Any) -> Path:
        """Write the pipeline folder."""
        ...


@alone_in("run.out")
def train_prior(run: TokensRun) -> Path:
    """Train until `num_steps`, continuing where an earlier call stopped; returns the pipeline folder.

    Raises:
        UserError: data, folder and models do not fit each other (before anything is trained), or a loss is not finite.
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    kind: type[PriorTask] = task_of(run)
    accelerator = start_run(
        run,
        find_unused_parameters=kind.has_unused_parameters(run),
        sharded=kind.sharded if run.parallel == "fsdp2" else (),
    )
    task = kind(run)
    task.place(accelerator.device)
    train = task.train
    write_record(
        accelerator,
        run,
        data_fingerprint=train.fingerprint,
        tokenizer_fingerprint=fingerprint(task.tokenizer),
        class_names=list(train.class_names),
        **task.facts,
    )
    with accelerator.main_process_first():
        cache = open_cache(run, task)
    task.with_cache(cache)
    bare = task.network
    if run.checkpoint_activations:
        bare.enable_gradient_checkpointing()
    validation = held_out_tokens(task) if accelerator.is_main_process else None

    model, optimizer = accelerator.prepare(bare, adamw(bare, run.optim))
    task.compile()
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
    guard, bar = FiniteGuard(accelerator.device), display(accelerator, run, progress, "prior")
    logger.info("token accuracy of a few per cent is healthy on natural images; drawings reach more")
    model.train()

    def save() -> None:
        guard.check(run, progress.step, ema.averages.values())
        save_checkpoint(accelerator, ema, progress, run.out, keep=run.keep_checkpoints)

    with StopRequest() as stop, bar, task.regularisation():
        while progress.step < run.num_steps:
            if stop.agreed(accelerator):
                save()
                raise KeyboardInterrupt
            rate = set_rates(optimizer, progress.step, run.optim, run.num_steps)
            measured = []

            for batch in islice(batches, run.accumulate):
                with accelerator.accumulate(model):
                    losses = task.losses(model, batch, progress.step)
                    accelerator.backward(losses.total)
                    if accelerator.sync_gradients:
                        grad_norm = clip_gradients(accelerator, model, run.optim.max_grad_norm)
                        guard.watch(grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                guard.watch(losses.total)
                if progress.due(run.log_every, ahead=1):
                    measured.append(losses.logged())

            progress.step += 1
            progress.images += run.batch_size
            ema.update(bare)
            bar.update()

            if progress.due(run.log_every):
                guard.check(run, progress.step)
                values = task.step_values(means_of(measured, accelerator), progress.step - 1)
                log.write(progress, values | {"train/learning_rate": rate, "train/grad_norm": grad_norm.item()})
                bar.measured({"bits": f"{values['train/bits_per_token']:.3f}"}, images=progress.images)
            if progress.due(run.validate_every) or progress.due(run.preview_every):
                averaged = task.averaged(ema)
                if validation is not None and progress.due(run.validate_every):
                    log.write(progress, task.held_out_bits(averaged, *validation))
                if accelerator.is_main_process and progress.due(run.preview_every):
                    task.save_samples(averaged, run.out / "previews", progress.step)
            if progress.due(run.save_every):
                save()
    folder = task.export(accelerator, task.averaged(ema))
    # they write what they hold; the process group stays, since the caller may train again
    for tracker in accelerator.trackers:
        tracker.finish()
    return folder


def bits_by_level(
    prefix: str, level: str, nats: Float[Tensor, " levels"], lengths: Mapping[int, int]
) -> dict[str, float]:
    """Bits per token of all, and of the levels by their numbers; `lengths` are their tokens.

    >>> found = bits_by_level("val", "scale", torch.tensor([3.0, 1.0]) / nats_to_bits(1), {0: 1, 2: 3})
    >>> {name: round(bits, 4) for name, bits in found.items()}
    {'val/bits_per_token': 1.5, 'val/bits_scale0': 3.0, 'val/bits_scale2': 1.0}
    """
    bits = {k: nats_to_bits(value) for k, value in zip(lengths, nats.tolist(), strict=True)}
    mean = sum(bits[k] * length for k, length in lengths.items()) / sum(lengths.values())
    return {f"{prefix}/bits_per_token": mean} | {f"{prefix}/bits_{level}{k}": value for k, value in bits.items()}


def open_cache(run: TokensRun, task: PriorTask) -> TokenCache:
    """The token cache of this run: made at the first start, opened again afterwards."""
    return TokenCache.build(
        run.token_cache or run.out / "tokens",
        task.encoder,
        task.train,
        num_views=views_per_image(run, task.train),
        max_images=run.max_images,
        num_workers=run.num_workers,
        image_size=task.image_size,
        augment=augmentation(run, task.train),
        seed=run.seed,
        batch_size=64,
        device=task.tokenizer.device,
    )


def measured_images(held_out: ImageSource) -> Sequence[int]:
    """Numbers of the held-out images whose likelihood is measured while training."""
    return spread(len(held_out), _VALIDATION_IMAGES)


@torch.no_grad()
def held_out_tokens(task: PriorTask) -> tuple[Tensor, Tensor]:
    """Token ids (n, L) and labels (n,) of held-out images, without augmentation."""
    views, device = EvaluationImages(task.held_out, task.image_size), task.tokenizer.device
    ids, labels = [], []
    chosen = measured_images(task.held_out)
    for start in range(0, len(chosen), 64):
        batch = views.batch(chosen[start : start + 64])
        ids.append(task.token_ids(batch["image"].to(device)))
        labels.append(batch["class_label"])
    return torch.cat(ids), torch.cat(labels).to(device)
