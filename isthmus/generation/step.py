"""What every generation loop yields, whatever the family: server and studio know only this."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
from jaxtyping import Int
from torch import Tensor

Pictures = list[PIL.Image.Image] | np.ndarray | Tensor
"""Images as a pipeline returns them: PIL, numpy (b, h, w, 3) in [0, 1], torch (b, 3, h, w) in [0, 1] or features."""


@dataclass
class GenerationStep:
    """One finished step of a generation.

    Attributes:
        index: step, from 0 (next-scale models: the scale).
        total: number of steps.
        token_ids: (b, l), the tokens this step drew.
        preview: what the images look like so far; None where nobody asked for pictures.
    """

    index: int
    total: int
    token_ids: Int[Tensor, "b l"]
    preview: Pictures | None = None


def token_hashes(token_ids: Sequence[Int[Tensor, "b _"]]) -> list[str]:
    """SHA-256 (hex) of the token ids of every image, over all steps, as little-endian int32."""
    rows = zip(*(ids.cpu().numpy().astype("<i4") for ids in token_ids), strict=True)
    return [hashlib.sha256(b"".join(step.tobytes() for step in row)).hexdigest() for row in rows]
