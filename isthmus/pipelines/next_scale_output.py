"""What a call of a next-scale pipeline returns."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from isthmus.generation.step import Pictures


@dataclass
class NextScalePipelineOutput:
    """What a call returns.

    Attributes:
        images: as `output_type` says; "latent" gives the features (b, d, grid, grid).
        token_ids: one int tensor (b, s_k * s_k) per scale, on the CPU.
        class_labels: class id of every image; `null_class_id` where no class was asked for.
        seeds: (seed, image index) of every image: `pipe(label, seed=seed, image_index=index)` draws it again.
        num_forwards: predictions of a scale that the transformer made; labelled and null rows of a scale are one.
    """

    images: Pictures
    token_ids: list[Int[Tensor, "b _"]]
    class_labels: list[int]
    seeds: list[tuple[int, int]]
    num_forwards: int
