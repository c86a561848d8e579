"""Images through their own tokens and back, as they look after each stage: scales (next-scale) or groups (D-AR)."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import UInt8

from isthmus.functional.shapes import Images
from isthmus.pictures import to_uint8
from isthmus.pipelines.loading import AnyPipeline

if TYPE_CHECKING:
    from isthmus.pipelines.dar import DARPipeline
    from isthmus.pipelines.next_scale import NextScalePipeline

Pictures = UInt8[np.ndarray, "b h w 3"]


def reconstructions_by_stage(
    pipeline: AnyPipeline, images: Images, *, first_index: int = 0
) -> dict[str, UInt8[np.ndarray, "b h w 3"]]:
    """8-bit reconstructions by the name of the stage, in order; the last is the whole reconstruction.

    Next-scale: from the first scale, the first two, and so on. D-AR: the preview after every solver step, which has
    seen the tokens of the steps before it; where several steps wait for the same tokens, the last of them.

    Args:
        pipeline: of either family.
        images: in [-1, 1], of the model's size.
        first_index: number of the first image in the whole set; image i starts from the noise of (0, i) (D-AR).

    Raises:
        UserError: the images do not fit the model.
    """
    # imported here: reading a D-AR model needs nothing of the other family but this name
    from isthmus.pipelines.next_scale import NextScalePipeline

    if isinstance(pipeline, NextScalePipeline):
        return _by_scale(pipeline, images)
    return _by_tokens(pipeline, images, first_index)


def reconstruction_with_steps(
    pipeline: "DARPipeline", images: Images, num_inference_steps: int, *, first_index: int = 0
) -> UInt8[np.ndarray, "b h w 3"]:
    """The whole D-AR reconstruction with another number of solver steps.

    Raises:
        UserError: no such number of steps, or the images do not fit the model.
    """
    found = pipeline.reconstruct(
        images, num_inference_steps=num_inference_steps, seed=0, image_index=first_index, output_type="latent"
    )
    return to_uint8(torch.as_tensor(found))


def _by_scale(pipeline: "NextScalePipeline", images: Images) -> dict[str, Pictures]:
    token_ids = pipeline.encode(images)
    found = {}
    for scale, name in enumerate(pipeline.step_names(len(token_ids))):
        drawn = torch.as_tensor(pipeline.decode(token_ids[: scale + 1], output_type="pt"))
        found[f"up to {name}"] = to_uint8(drawn * 2 - 1)
    return found


def _by_tokens(pipeline: "DARPipeline", images: Images, first_index: int) -> dict[str, Pictures]:
    token_ids = pipeline.encode(images)
    # every token is given, so the prior draws none: the steps are those of the reconstruction
    steps = pipeline.stream(
        [None] * len(images),
        prefix_token_ids=token_ids,
        height=images.shape[2],
        width=images.shape[3],
        seed=0,
        image_index=first_index,
        guidance_scale=1.0,
        output_type="latent",
    )
    found = {}
    for step in steps:
        name = pipeline.step_names(step.total)[step.index]
        found[name] = to_uint8(torch.as_tensor(step.preview))
    return found
