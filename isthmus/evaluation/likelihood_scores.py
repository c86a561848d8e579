"""What held-out images cost under a model: nats per image, bits per token, and where they are spent.

The likelihood is that of an image's tokens given its class, not of its pixels: it compares priors over one tokenizer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Float, UInt8
from tqdm.auto import tqdm

from isthmus.errors import UserError
from isthmus.evaluation.reconstruction import as_floats
from isthmus.pipelines.labels import Label
from isthmus.pipelines.loading import AnyPipeline


@dataclass(frozen=True, eq=False)
class LikelihoodScores:
    """Of n images with l tokens each; arrays per image, so that intervals follow.

    Attributes:
        nats_per_image: -log p(tokens | class).
        bits_per_token: of each image, mean over its tokens.
        by_position: bits of every token, mean over images, in the order of generation.
        by_stage: name of the scale, or of the group of tokens -> bits per token, mean over images.
    """

    nats_per_image: Float[np.ndarray, " n"]
    bits_per_token: Float[np.ndarray, " n"]
    by_position: Float[np.ndarray, " l"]
    by_stage: dict[str, float]

    def __len__(self) -> int:
        return len(self.nats_per_image)


def likelihood_scores(
    pipeline: AnyPipeline,
    images_uint8: Iterable[UInt8[np.ndarray, "_ _ 3"]],
    class_labels: Sequence[Label],
    *,
    batch_size: int = 32,
) -> LikelihoodScores:
    """Cost of every image under its class: fp32 logits, without guidance or filters.

    Args:
        pipeline: of either family.
        images_uint8: (h, w, 3) images of the model's size, 0..255; held out, or the costs are those of memory.
        class_labels: one per image: names, indices or None.
        batch_size: images at once.

    Raises:
        UserError: no image, another number of labels, or images or labels that do not fit the model.
    """
    source, bits = iter(images_uint8), []
    with tqdm(desc="likelihood", unit="image", total=len(class_labels), disable=None) as bar:
        count = 0
        while batch := list(islice(source, batch_size)):
            labels = list(class_labels[count : count + len(batch)])
            count += len(batch)
            if count > len(class_labels):
                break
            bits.append(pipeline.bits_per_token(as_floats(np.stack(batch)), labels).cpu().double().numpy())
            bar.update(len(batch))
    if not bits or count != len(class_labels):
        raise UserError(
            f"a likelihood needs images and one class label for each, got {len(class_labels)} label(s) and "
            f"{'more' if count > len(class_labels) else count} image(s)."
        )
    table = np.concatenate(bits)
    by_position, by_stage, start = table.mean(axis=0), {}, 0
    for name, length in stage_lengths(pipeline).items():
        by_stage[name] = float(by_position[start : start + length].mean())
        start += length
    return LikelihoodScores(table.sum(axis=1) * math.log(2), table.mean(axis=1), by_position, by_stage)


def stage_lengths(pipeline: AnyPipeline) -> dict[str, int]:
    """Tokens of every scale, or of every group of tokens, by name, in the order of generation."""
    # imported here: see reconstruction_stages
    from isthmus.pipelines.next_scale import NextScalePipeline

    if isinstance(pipeline, NextScalePipeline):
        names = pipeline.step_names(pipeline.schedule.num_scales)
        return dict(zip(names, pipeline.schedule.lengths, strict=True))
    size = pipeline.image_tokenizer.tokens_per_group
    total = pipeline.token_layout.num_tokens
    return {f"tokens {start + 1} to {start + size}": size for start in range(0, total, size)}
