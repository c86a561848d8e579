"""Train a tokenizer on images (`isthmus train tokenizer`): a pyramid of scales, or groups of tokens and a decoder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.batches import EvaluationImages
from isthmus.data.source import ImageSource, ImageStream
from isthmus.data.views import Batch
from isthmus.files import alone_in
from isthmus.nn.shapes import Images, TokenPyramid
from isthmus.registry import task_of
from isthmus.training.checkpoints import Progress, resume, save_checkpoint
from isthmus.training.codebook import CodebookUsage, code_counts, perplexity, set_codes
from isthmus.training.config import ImagesRun
from isthmus.training.images import first_images, image_batches, open_splits, stream_states
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

# images the codebook starts from
_CODEBOOK_IMAGES = 512


@dataclass(kw_only=True)
class TokenizerLosses:
    """What one part of a batch gave."""

    named: dict[str, Tensor]
    """For the log; those under `weighted/` add up to what is minimised."""
    token_ids: TokenPyramid
    """(b, n) of every scale, or group of tokens; empty where nothing was quantised."""
    latents: Tensor
    """(b, ...), what the encoder put out."""
    total: Float[Tensor, ""] = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.stack([loss for name, loss in self.named.items() if name.startswith("weighted/")]).sum()


@runtime_checkable
class TokenizerTask(Protocol):
    """What a run trains: its networks, and what a loss is; to derive from.

    Made on the device of the training, in training mode.
    """

    network: Any
    """What the optimizer trains."""
    image_size: int
    codebook: str | None
    """Name of the codebook among the network's parameters; None for continuous tokens."""
    codebook_size: int
    starts_codebook_at: int | None
    """Step before which the codebook starts from the encoder's outputs; None where it never does."""
    level: Literal["scale", "group"]
    """What usage is counted by."""
    num_levels: int

    def __init__(self, run: Any, accelerator: Accelerator) -> None: ...

    @staticmethod
    def describe(run: Any) -> str:
        """What a run would be: settings, size, cost and memory, for a dry run. No weight is allocated."""
        ...

    def prepare_others(self) -> None:
        """Hand to accelerate what is trained beside the network: nothing."""

    def draw(self, parts: Sequence[Batch]) -> Sequence[Any]:
        """What is drawn at random for each part of a batch, where all parts must be known at once: nothing."""
        return [None] * len(parts)

    def losses(self, model: nn.Module, batch: Batch, drawn: Any, *, step: int, quantize: bool) -> Any:
        """`TokenizerLosses` of one part; `model` is the network as accelerate prepared it."""
        ...

    def train_others(self, losses: Any, step: int) -> dict[str, Tensor]:
        """A step, on the same part, of what is trained beside the network; returns its losses."""
        return {}

    def first_codes(self, images: Images) -> Float[Tensor, "k d"]:
        """A codebook near what the encoder puts out for these images."""
        ...

    def new_codes(self, latents: Tensor, count: int, step: int) -> Float[Tensor, "n d"]:
        """`count` codes at what these latents need."""
        ...

    def averaged(self, ema: ExponentialMovingAverage) -> Any:
        """What is measured and saved: copies that hold the averages."""
        ...

    def measure(self, model: Any, views: EvaluationImages, *, quantize: bool) -> dict[str, float]:
        """Measurements on held-out images; with `quantize` `val/usage` is among them."""
        ...

    def save_previews(self, model: Any, views: EvaluationImages, folder: Path, step: int, *, quantize: bool) -> None:
        """A picture of reconstructions."""
        ...

    def export(self, model: Any, source: ImageSource | ImageStream) -> Path:
        """Write the tokenizer into the run's folder."""
        ...


@alone_in("run.out")
def train_tokenizer(run: ImagesRun) -> Path:
    """Train until `num_steps`, continuing where an earlier call stopped; returns the run's folder.

    Raises:
        UserError: data, folder and model do not fit each other (before anything is trained), or a loss is not finite.
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    accelerator = start_run(run, find_unused_parameters=True)
    task: TokenizerTask = task_of(run)(run, accelerator)
    bare, image_size = task.network, task.image_size
    train, held_out = open_splits(run, image_size)
    write_record(accelerator, run, data_fingerprint=train.fingerprint)

    model, optimizer = accelerator.prepare(bare, adamw(bare, run.optim))
    task.prepare_others()
    ema = ExponentialMovingAverage(bare, run.ema_decay)
    usage = CodebookUsage(task.num_levels, task.codebook_size, device=accelerator.device)
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

    def save() -> None:
        guard.check(run, progress.step, ema.averages.values())
        progress.stream_states = stream_states(batches)
        save_checkpoint(accelerator, ema, progress, run.out, keep=run.keep_checkpoints, extras=usage.state_dict())

    with StopRequest() as stop, bar:
        while progress.step < run.num_steps:
            if stop.agreed(accelerator):
                save()
                raise KeyboardInterrupt
            rate = set_rates(optimizer, progress.step, run.optim, run.num_steps)
            quantize = task.codebook is not None and (bool(run.from_model) or progress.step >= run.continuous_steps)
            if task.codebook is not None and progress.step == task.starts_codebook_at:
                images = first_images(run, train, image_size=image_size, count=_CODEBOOK_IMAGES)
                set_codes(bare, task.codebook, task.first_codes(images.to(accelerator.device)), ema)

            counts, measured = torch.zeros_like(usage.hits()), []
            parts = list(islice(batches, run.accumulate))
            for batch, drawn in zip(parts, task.draw(parts), strict=True):
                with accelerator.accumulate(model):
                    losses = task.losses(model, batch, drawn, step=progress.step, quantize=quantize)
                    accelerator.backward(losses.total)
                    if accelerator.sync_gradients:
                        grad_norm = clip_gradients(accelerator, model, run.optim.max_grad_norm)
                        guard.watch(grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                others = task.train_others(losses, progress.step)
                if losses.token_ids:
                    counts += code_counts(losses.token_ids, task.codebook_size)
                guard.watch(losses.total)
                values = {**losses.named, **others, "loss": losses.total}
                measured.append({name: value.detach() for name, value in values.items()})

            progress.step += 1
            progress.images += run.batch_size
            ema.update(bare)
            if quantize:
                usage.update(cast(Tensor, accelerator.reduce(counts, "sum")))
                if run.revives_at(progress.step):
                    # those of the last part of the whole batch
                    latents = cast(Tensor, accelerator.gather(losses.latents.detach()))
                    revive(task, latents, usage, ema, progress.step)
            bar.update()

            if progress.due(run.log_every):
                guard.check(run, progress.step)
                values = {f"train/{name}": value.item() for name, value in means_of(measured, accelerator).items()}
                values |= used_codes(task, usage) if quantize else {}
                log.write(progress, values | {"train/learning_rate": rate, "train/grad_norm": grad_norm.item()})
                bar.measured({"loss": f"{values['train/loss']:.3f}"}, images=progress.images)
            if (progress.due(run.validate_every) or progress.due(run.preview_every)) and accelerator.is_main_process:
                averaged, views = task.averaged(ema), EvaluationImages(held_out, image_size)
                if progress.due(run.validate_every):
                    values = task.measure(averaged, views, quantize=quantize)
                    log.write(progress, values)
                    if quantize:
                        warn_of_collapse(run, values["val/usage"])
                if progress.due(run.preview_every):
                    task.save_previews(averaged, views, run.out / "previews", progress.step, quantize=quantize)
            if progress.due(run.save_every):
                save()
    folder = task.export(task.averaged(ema), train)
    # they write what they hold; the process group stays, since the caller may train again
    for tracker in accelerator.trackers:
        tracker.finish()
    return folder


def revive(
    task: TokenizerTask, latents: Tensor, usage: CodebookUsage, ema: ExponentialMovingAverage, step: int
) -> None:
    """Move the codes that no level uses to where these latents need some."""
    assert task.codebook is not None, "there is no usage without codes"
    dead = ~usage.used().any(dim=0)
    if count := int(dead.sum()):
        set_codes(task.network, task.codebook, task.new_codes(latents, count, step), ema, rows=dead)
        logger.info("step %d: revived %d of %d codes", step, count, len(dead))


def used_codes(task: TokenizerTask, usage: CodebookUsage) -> dict[str, float]:
    """What a log line says of the codes: the share that any level uses, and the perplexity of every level."""
    values = {"train/usage": float(usage.used().any(dim=0).float().mean())}
    return values | {f"train/perplexity_{task.level}{k}": float(v) for k, v in enumerate(perplexity(usage.hits()))}


def warn_of_collapse(run: ImagesRun, usage: float) -> None:
    """Say in words when held-out images use too few codes."""
    if usage < run.usage_warning:
        logger.warning(
            "held-out images use %.0f %% of the codes (threshold %.0f %%): the codebook is collapsing. Try more "
            "--continuous-steps, a smaller --revive-every or a smaller --model.codebook-size.",
            100 * usage,
            100 * run.usage_warning,
        )
