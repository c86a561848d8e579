"""Care of a codebook in training: how much of it is used, its start from data, the revival of unused codes.

A codebook that starts at random before the encoder has learnt anything is used by a few codes only and stays so. So the
encoder may train without quantisation first; the codebook then starts from what it puts out (residuals of all scales,
or latents), and codes that fall out of use are moved onto what it puts out for current images.
"""

import torch
from accelerate.utils import broadcast
from jaxtyping import Bool, Float
from torch import Tensor, nn

from isthmus.errors import UserError
from isthmus.nn.shapes import TokenPyramid
from isthmus.training.optim import ExponentialMovingAverage

_USED_SHARE = 0.08


def code_counts(token_ids: TokenPyramid, codebook_size: int) -> Float[Tensor, "scales k"]:
    """How often each code was chosen at each scale. With several processes, sum these before `update`.

    >>> code_counts([torch.tensor([[2]]), torch.tensor([[0, 0, 1, 2]])], 3).tolist()
    [[0.0, 0.0, 1.0], [2.0, 1.0, 1.0]]
    """
    return torch.stack([torch.bincount(ids.flatten(), minlength=codebook_size).float() for ids in token_ids])


def perplexity(hits: Float[Tensor, "scales k"]) -> Float[Tensor, " scales"]:
    """exp(entropy) of the codes of each scale: 1 (one code, or no hits) to k (all alike).

    >>> perplexity(torch.tensor([[8.0, 0.0], [2.0, 2.0]])).tolist()
    [1.0, 2.0]
    """
    shares = hits / hits.sum(dim=1, keepdim=True).clamp_min(torch.finfo(hits.dtype).tiny)
    return torch.special.entr(shares).sum(dim=1).exp()


class CodebookUsage:
    """Moving average of the hits per step of every code, one row per scale (or group of tokens).

    An update keeps the share `decay` of it, in [0, 1). Divided by 1 - decay ** step it is free of the bias towards its
    zero start, so the first step already gives the hits of that step.

    >>> usage = CodebookUsage(num_scales=1, codebook_size=4)
    >>> usage.update(code_counts([torch.tensor([[0, 0, 1, 1]])], 4))
    >>> usage.used().tolist()
    [[True, True, False, False]]
    """

    def __init__(self, num_scales: int, codebook_size: int, *, decay: float = 0.99, device: torch.device | str = "cpu"):
        self.decay, self.step = decay, 0
        self._average = torch.zeros(num_scales, codebook_size, device=device)

    @torch.no_grad()
    def update(self, counts: Float[Tensor, "scales k"]) -> None:
        """Count one training step; `counts` from `code_counts`, summed over processes."""
        self._average.lerp_(counts.to(self._average.device), 1 - self.decay)
        self.step += 1

    def hits(self) -> Float[Tensor, "scales k"]:
        """Average hits per step; zeros before the first update."""
        return self._average / (1 - self.decay**self.step) if self.step else self._average.clone()

    def used(self) -> Bool[Tensor, "scales k"]:
        """Codes with at least 8 % of the hits that they would have if all codes of that scale were hit alike.

        The threshold of a scale is proportional to its tokens: a 1 x 1 scale is not dead for having few.
        """
        hits = self.hits()
        threshold = _USED_SHARE * hits.mean(dim=1, keepdim=True)
        return (hits >= threshold) & (hits > 0)

    def state_dict(self) -> dict[str, Tensor]:
        """Average and step counter, for a checkpoint."""
        return {"average": self._average.clone(), "step": torch.tensor(self.step)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`. Raises UserError for one of another number of scales or codes."""
        found = {key: tuple(value.shape) for key, value in state.items()}
        expected = {"average": tuple(self._average.shape), "step": ()}
        if found != expected:
            raise UserError(
                f"codebook usage must have the entries {expected}, got {found}. "
                "Resume with the scale_sizes and codebook_size of the checkpoint."
            )
        self._average.copy_(state["average"])
        self.step = int(state["step"])


@torch.no_grad()
def set_codes(
    network: nn.Module,
    name: str,
    codes: Float[Tensor, "n d"],
    ema: ExponentialMovingAverage,
    *,
    rows: Bool[Tensor, " k"] | None = None,
) -> None:
    """Set the codebook, the parameter `name` of the network, or n `rows` of it, in every process alike.

    Their averages start anew.
    """
    codebook = network.get_parameter(name)
    codebook[slice(None) if rows is None else rows] = codes.to(codebook)
    # sums on a GPU may differ between processes, and nothing later would bring the copies together again
    broadcast(codebook.data)
    ema.restart(name, codebook, rows=rows)
