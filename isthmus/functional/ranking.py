"""How well a score orders two kinds of things."""

from jaxtyping import Bool, Float
from torch import Tensor


def area_under_roc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN where there is only one kind.

    0.5 is what a coin reaches. (Mann-Whitney U over the number of pairs.)

    >>> import torch
    >>> area_under_roc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True]))
    0.875
    """
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return float("nan")
    values, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2)[inverse]  # the mean rank of equal scores, from 1
    u = ranks[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(u / (num_positive * num_negative))
