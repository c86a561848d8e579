"""How the tokens of samples use the codebook, step by step of the generation."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from isthmus.evaluation.protocol import Curve


def code_counts(
    token_ids: Int[np.ndarray, "n l"], lengths: Sequence[int], codebook_size: int
) -> Int[np.ndarray, "s k"]:
    """How often every code occurs in every step; steps that hold no token (a short run) count nothing.

    >>> code_counts(np.array([[0, 1, 1]]), (1, 2), 3).tolist()
    [[1, 0, 0], [0, 2, 0]]
    """
    ends = np.minimum(np.cumsum(lengths), token_ids.shape[1])
    starts = np.concatenate([[0], ends[:-1]])
    parts = [token_ids[:, start:end].reshape(-1) for start, end in zip(starts, ends, strict=True)]
    return np.stack([np.bincount(part, minlength=codebook_size) for part in parts]).astype(np.int64)


def usage_curves(counts: Int[np.ndarray, "s k"], names: Sequence[str], along: str) -> list[Curve]:
    """Share of the codes in use, and the perplexity of their frequencies, by step."""
    used = (counts > 0).mean(axis=1)
    return [
        Curve(name="codes in use (share)", along=along, positions=tuple(names), values=tuple(map(float, used))),
        Curve(
            name="perplexity of the codes",
            along=along,
            positions=tuple(names),
            values=tuple(map(float, _perplexity(counts))),
        ),
    ]


def _perplexity(counts: Int[np.ndarray, "s k"]) -> Float[np.ndarray, " s"]:
    """Perplexity, exp of the entropy of each row's frequencies; 1 where one code is always drawn."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.exp(-(shares * logs).sum(axis=1))
