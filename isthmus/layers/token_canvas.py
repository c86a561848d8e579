"""A rough image that tokens paint together: what lets one group of tokens build on all groups before it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.functional.shapes import Images

Painted = Float[Tensor, "b n 3 side side"]


class TokenCanvas(nn.Module):
    """Every token adds to a small image through a linear map of its own, of low rank.

    In the published decoder a step knows the earlier tokens only through the few vectors of its own group; a causal
    stack that is trained for minutes does not gather them there. A sum does so from the first step of training on.

    Args:
        num_tokens: tokens of an image.
        condition_width: width of their conditions.
        side: side of the small image in pixels.
        rank: rank of each token's map.
    """

    def __init__(self, num_tokens: int, condition_width: int, *, side: int, rank: int):
        super().__init__()
        self.side = side
        self.down = nn.Linear(condition_width, rank)
        self.brushes = nn.Parameter(torch.empty(num_tokens, rank, 3 * side**2))
        self.background = nn.Parameter(torch.empty(3 * side**2))

    def reset_parameters(self) -> None:
        """Maps under which all tokens together paint with a standard deviation of 0.3, on grey."""
        num_tokens, rank, _ = self.brushes.shape
        nn.init.normal_(self.brushes, std=0.3 / (num_tokens * rank) ** 0.5)
        nn.init.zeros_(self.background)

    def forward(self, condition: Float[Tensor, "b n condition_width"], first: int) -> Painted:
        """What each of the tokens first, first + 1, ... adds; the background belongs to token 0."""
        painted = torch.einsum("bnr,nrp->bnp", self.down(condition), self.brushes[first : first + condition.shape[1]])
        if first == 0:
            painted = torch.cat([painted[:, :1] + self.background, painted[:, 1:]], dim=1)
        return painted.unflatten(2, (3, self.side, self.side))


def shown_at(canvas: Float[Tensor, "b 3 side side"], height: int, width: int) -> Images:
    """The small image at the size of the pixels."""
    return F.interpolate(canvas, size=(height, width), mode="bilinear", align_corners=False)
