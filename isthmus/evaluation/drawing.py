"""Drawing the samples of an evaluation, chunk by chunk, with their features."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from tqdm import tqdm

from isthmus.evaluation.feature_networks import FeatureNetwork
from isthmus.evaluation.features import extract_features
from isthmus.evaluation.processes import Processes
from isthmus.evaluation.samples import CHUNK, ChunkStore, SampleChunk, chunk_size
from isthmus.pipelines.labels import Label
from isthmus.pipelines.memory import naming_next_batch_size

if TYPE_CHECKING:
    from isthmus.pipelines.loading import AnyPipeline

logger = logging.getLogger("isthmus")

# images per forward of the feature network, whatever the batch of the draw: sums are rounded alike
FEATURE_BATCH = 50


def draw_chunks(
    pipeline: "AnyPipeline",
    store: ChunkStore,
    labels: Int[np.ndarray, " n"],
    *,
    seed: int,
    request: Mapping[str, Any],
    network: FeatureNetwork,
    batch_size: int,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
    title: str = "samples",
) -> int:
    """Draw what is missing of this process's share; returns how many images that were.

    Args:
        pipeline: draws.
        store: where chunks go; a chunk that is there is not drawn again.
        labels: class id of every image of the evaluation.
        seed: image i is drawn from (seed, i).
        request: arguments of the pipeline's call beside labels, seed and number.
        network: features of the finished images.
        batch_size: images drawn at once; it changes no image.
        processes: chunk c belongs to process c modulo their number.
        title: of the progress bar.

    Raises:
        UserError: memory ran out (names the next batch size to try).
    """
    mine = [chunk for chunk in store.missing(len(labels)) if chunk % processes.count == processes.rank]
    todo = sum(chunk_size(chunk, len(labels)) for chunk in mine)
    quiet = True if logger.getEffectiveLevel() > logging.INFO or not todo else None
    with tqdm(total=todo, desc=title, unit="image", disable=quiet) as bar:
        for chunk in mine:
            indices = range(chunk * CHUNK, chunk * CHUNK + chunk_size(chunk, len(labels)))
            images, token_ids = [], []
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                drawn = _draw(pipeline, batch, labels, seed, request)
                images.append(drawn[0])
                token_ids.append(drawn[1])
                bar.update(len(batch))
            pictures = np.concatenate(images)
            rows = extract_features(network, pictures, batch_size=FEATURE_BATCH)
            store.write(chunk, SampleChunk(pictures, labels[list(indices)], np.concatenate(token_ids), rows))
    return todo


def _draw(
    pipeline: "AnyPipeline",
    indices: Sequence[int],
    labels: Int[np.ndarray, " n"],
    seed: int,
    request: Mapping[str, Any],
) -> tuple[UInt8[np.ndarray, "b h w 3"], Int[np.ndarray, "b l"]]:
    """Images and token ids; the pictures are those `isthmus sample` writes."""
    ids: list[Label] = [None if labels[i] == pipeline.num_classes else int(labels[i]) for i in indices]
    with naming_next_batch_size(len(ids)):
        result = pipeline(ids, seed=seed, image_index=list(indices), **request)
    drawn = result.token_ids
    token_ids = drawn if isinstance(drawn, Tensor) else torch.cat(list(drawn), dim=1)
    assert isinstance(result.images, list), "pictures are asked for"
    return np.stack([np.asarray(picture) for picture in result.images]), token_ids.numpy()
