"""A small network that tells which tokens of a drawn scale do not fit the others.

"Is this draw the true token?" cannot be answered better than by the model's own probability, where that is calibrated.
What the model does not know is which tokens were drawn beside this one: tokens of a scale are drawn independently. The
critic reads the whole map. Source: our own (spec of SRDD, 3.2), in place of the paper's future "learned policy".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.functional.pyramid import area_downsample
from isthmus.functional.quantization import tokens_to_map
from isthmus.functional.shapes import FeatureMap, LatentMap, ScaleTokens
from isthmus.models.saved_model import SavedModel, records_arguments

NUM_MEASURES = 3


@dataclass
class TokenCriticOutput:
    """What `TokenCritic.forward` returns.

    Attributes:
        plausibility: (b, l), log-odds that the token is the image's own and was not drawn by the model.
    """

    plausibility: Float[Tensor, "b l"]


def critic_measures(logits: Float[Tensor, "b l v"], token_ids: ScaleTokens) -> Float[Tensor, "b l 3"]:
    """What the model itself says of every token: log probability, entropy (both nats) and margin.

    The margin is the probability of the likeliest code less that of the token, in [0, 1]. The logits are those of the
    ordinary prediction, unguided, at temperature 1.

    >>> even = critic_measures(torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.long))
    >>> torch.allclose(even, torch.tensor([[[-math.log(4), math.log(4), 0.0]]]))
    True
    """
    log_p = logits.float().log_softmax(dim=-1)
    own = log_p.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    entropy = -(p * log_p.clamp(min=-100)).sum(dim=-1)
    return torch.stack([own, entropy, p.amax(dim=-1) - own.exp()], dim=-1)


class CriticBlock(nn.Module):
    """Norm, GELU, 3x3 convolution, on a residual stream."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b width s s"]) -> Float[Tensor, "b width s s"]:
        """Map of the same shape."""
        return x + self.conv(F.gelu(self.norm(x)))


class TokenCritic(SavedModel):
    """Log-odds of every token of a scale to be true rather than drawn.

    Args:
        scale_sizes: sides of the scales of the model it judges.
        codebook_size: codes of that model.
        codebook_dim: width of a code.
        width: channels, a multiple of 8.
        num_blocks: 3x3 convolutions.
        model_fingerprint: of the model it was trained for (`pair_fingerprint`); it judges no other.

    Raises:
        UserError: `width` is no multiple of 8.
    """

    @records_arguments
    def __init__(
        self,
        *,
        scale_sizes: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        width: int = 64,
        num_blocks: int = 4,
        model_fingerprint: str = "",
    ):
        super().__init__()
        if width % 8:
            raise UserError(f"width must be a multiple of 8 (GroupNorm has 8 groups), got {width}.")
        self.embed = nn.Conv2d(2 * codebook_dim + NUM_MEASURES, width, 1)
        self.scale_embedding = nn.Embedding(len(scale_sizes), width)
        self.blocks = nn.Sequential(*(CriticBlock(width) for _ in range(num_blocks)))
        self.norm = nn.GroupNorm(8, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(
        self,
        codes: FeatureMap,
        features: LatentMap,
        measures: Float[Tensor, "b l 3"],
        side: int,
    ) -> TokenCriticOutput:
        """Judge one scale.

        Args:
            codes: (b, d, s, s), of its tokens.
            features: before the scale.
            measures: of its tokens, from `critic_measures`.
            side: s, one of `scale_sizes`.
        """
        sides = tuple(self.config["scale_sizes"])
        if side not in sides:
            raise UserError(f"this critic judges scales of sides {sides}, got {side}. Use the critic of this model.")
        log_v = math.log(max(self.config["codebook_size"], 2))
        # nats in units of log(codes): about -2..1 for any codebook
        units = measures.new_tensor([log_v, log_v, 1.0])
        kind = self.embed.weight.dtype
        parts = [codes.float(), area_downsample(features.float(), side), tokens_to_map(measures / units)]
        x = self.embed(torch.cat(parts, dim=1).to(kind))
        x = x + self.scale_embedding.weight[sides.index(side), :, None, None]
        x = self.head(F.gelu(self.norm(self.blocks(x))))
        return TokenCriticOutput(x.flatten(1).float())
