"""What a run trains on: random views of images by index or of a stream, and a held-out part to measure on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor

from isthmus.data.batches import TrainingImages, training_batches
from isthmus.data.huggingface import ImageStream, StreamedBatches, hold_out, open_stream
from isthmus.data.images import Augmentation
from isthmus.data.opening import open_source
from isthmus.data.source import ImageSource, WantedColumns
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.nn.draws import LABEL_DROP, stream
from isthmus.nn.shapes import Images
from isthmus.training.arguments import given
from isthmus.training.config import Run

# rows at the start of a stream that are measured on and never trained on
_HELD_OUT_OF_STREAM = 256


def augmentation(run: Run, source: ImageSource | ImageStream) -> Augmentation:
    """The augmentation of a run on `source`."""
    return replace(source.augmentation, **given(run.augment))


def open_split(run: Run, image_size: int, split: str) -> ImageSource:
    """The "train" or "val" images of a run, opened and not read. Raises UserError where they cannot be used."""
    columns = WantedColumns(run.image_column, run.label_column)
    return open_source(
        run.data, image_size=image_size, split=split, classes=run.classes, strict=run.strict, columns=columns
    )


def open_splits(run: Run, image_size: int) -> tuple[ImageSource | ImageStream, ImageSource]:
    """Training and held-out images of a run. Raises UserError where they cannot be used, or a stream is to choose."""
    if not run.stream:
        return open_split(run, image_size, "train"), open_split(run, image_size, "val")
    if run.classes is not None:
        raise UserError(f"a stream cannot choose classes, got --classes {', '.join(run.classes)}. Leave one out.")
    columns = WantedColumns(run.image_column, run.label_column)
    return hold_out(open_stream(run.data, strict=run.strict, columns=columns), _HELD_OUT_OF_STREAM)


def image_batches(
    run: Run,
    source: ImageSource | ImageStream,
    *,
    image_size: int,
    step: int,
    rank: int,
    world_size: int,
    stream_states: Sequence[dict[str, Any]] | None,
) -> Iterator[Batch]:
    """Batches of training views from `step` on; one batch is what one process computes at once.

    `stream_states` are those that a checkpoint holds, one per process; data read by index need none. Raises UserError
    where a stream is continued with another number of processes.
    """
    share = {"batch_size": run.batch_size // run.accumulate, "rank": rank, "world_size": world_size}
    if not isinstance(source, ImageStream):
        views = TrainingImages(source, image_size=image_size, seed=run.seed, augment=augmentation(run, source))
        return training_batches(views, start_position=step * run.batch_size, num_workers=run.num_workers, **share)
    if stream_states and len(stream_states) != world_size:
        raise UserError(
            f"a stream continues with the number of processes it was started with ({len(stream_states)}), got "
            f"{world_size}: each process reads shards of its own."
        )
    return StreamedBatches(
        source,
        image_size=image_size,
        seed=run.seed,
        augment=augmentation(run, source),
        shuffle_buffer=run.shuffle_buffer,
        state=stream_states[rank] if stream_states else None,
        **share,
    )


def first_images(run: Run, source: ImageSource | ImageStream, *, image_size: int, count: int) -> Images:
    """The first `count` training views (or up to a batch more), the same in every process."""
    batches = image_batches(run, source, image_size=image_size, step=0, rank=0, world_size=1, stream_states=None)
    parts: list[Images] = []
    while sum(map(len, parts)) < count:
        parts.append(next(batches)["image"])
    return torch.cat(parts)


def stream_states(batches: Iterator[Batch]) -> list[dict[str, Any]] | None:
    """Where a stream stands in every process (all must call); None for data read by index."""
    return gather_object([batches.state_dict()]) if isinstance(batches, StreamedBatches) else None


def dropped_labels(
    labels: Int[Tensor, " b"], positions: Int[Tensor, " b"], *, rate: float, null_class_id: int, seed: int
) -> Int[Tensor, " b"]:
    """Labels with a share `rate` replaced by the null label; decided per training position."""
    coins = [stream(seed, LABEL_DROP, int(position)).random() for position in positions]
    dropped = torch.tensor(coins, dtype=torch.float64, device=labels.device) < rate
    return torch.where(dropped, null_class_id, labels)
