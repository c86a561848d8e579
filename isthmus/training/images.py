"""What a run trains on: random views of images by index or of a stream, and a held-out part to measure on."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Bool, Int
from torch import Tensor

from isthmus.data.avatars import Avatars, AvatarStream, StreamedAvatars, styles_named
from isthmus.data.batches import TrainingImages, training_batches
from isthmus.data.huggingface import StreamedBatches, TableStream, hold_out, open_stream
from isthmus.data.images import Augmentation
from isthmus.data.opening import check_columns, open_source, parse_spec
from isthmus.data.source import ImageSource, ImageStream, WantedColumns
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.nn.draws import LABEL_DROP, stream
from isthmus.nn.shapes import Images
from isthmus.training.arguments import given
from isthmus.training.config import Run, TokensRun

# images of a stream that are measured on and never trained on
_HELD_OUT_OF_STREAM = 256


def augmentation(run: Run, source: ImageSource | ImageStream) -> Augmentation:
    """The augmentation of a run on `source`."""
    return replace(source.augmentation, **given(run.augment))


def views_per_image(run: TokensRun, source: ImageSource | ImageStream) -> int:
    """Views of an image in the token cache: one of avatars that nothing moves, since all would be equal."""
    augment = augmentation(run, source)
    still = augment.resize_ratio == 1 and augment.max_shift == 0
    return 1 if still and isinstance(source, Avatars | AvatarStream) else run.num_views


def open_split(run: Run, image_size: int, split: str) -> ImageSource:
    """The "train" or "val" images of a run, opened and not read. Raises UserError where they cannot be used."""
    return open_source(
        run.data,
        image_size=image_size,
        split=split,
        classes=run.classes,
        strict=run.strict,
        columns=wanted_columns(run),
        max_images=wanted_drawings(run),
    )


def wanted_columns(run: Run) -> WantedColumns:
    """Columns of an hf: table that a run names."""
    return WantedColumns(run.image_column, run.label_column, run.caption_column)


def wanted_drawings(run: Run) -> int | None:
    """How many avatars a run trains on; None for other data, of which `max_images` says how many are encoded."""
    return run.max_images if parse_spec(run.data)[0] == "avatars" else None


def open_splits(run: Run, image_size: int) -> tuple[ImageSource | ImageStream, ImageSource]:
    """Training and held-out images of a run. Raises UserError where they cannot be used, or a table is to choose.

    Of a stream of avatars 256 drawings of the split `val` are held out (or as many more as make equal shares), of a
    table its first 256 rows.
    """
    if not run.stream:
        return open_split(run, image_size, "train"), open_split(run, image_size, "val")
    kind, place = parse_spec(run.data)
    if kind == "avatars":
        check_columns(run.data, wanted_columns(run))
        named = {"styles": styles_named(place), "image_size": image_size, "classes": run.classes}
        held_out = Avatars(split="val", num_images=10 * _HELD_OUT_OF_STREAM, **named)
        return AvatarStream(seed=run.seed, **named), held_out
    if run.classes is not None:
        raise UserError(f"a stream cannot choose classes, got --classes {', '.join(run.classes)}. Leave one out.")
    table = open_stream(run.data, strict=run.strict, columns=wanted_columns(run))
    return hold_out(table, _HELD_OUT_OF_STREAM)


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

    `stream_states` are those that a checkpoint holds of a table, one per process; what is read by index, or drawn by
    position, needs none. Raises UserError where a table is continued with another number of processes.
    """
    share = {"batch_size": run.batch_size // run.accumulate, "rank": rank, "world_size": world_size}
    if not isinstance(source, TableStream):
        named = {"image_size": image_size, "seed": run.seed, "augment": augmentation(run, source)}
        if isinstance(source, AvatarStream):
            views = StreamedAvatars(source, **named)
        else:
            assert isinstance(source, ImageSource), "the streams there are"
            views = TrainingImages(source, **named)
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
    return torch.where(dropped(positions, rate=rate, seed=seed).to(labels.device), null_class_id, labels)


def dropped(positions: Int[Tensor, " b"], *, rate: float, seed: int) -> Bool[Tensor, " b"]:
    """Which samples are trained without being told what they show, for guidance: a share `rate`, by position."""
    coins = [stream(seed, LABEL_DROP, int(position)).random() for position in positions]
    return torch.tensor(coins, dtype=torch.float64) < rate
