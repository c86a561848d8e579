"""What drawing one image costs a next-scale transformer, from its sizes alone."""

from collections.abc import Sequence


def visible_pairs(scale_sizes: Sequence[int], *, markov: bool) -> int:
    """Pairs (token, token it sees): its own scale, and for a causal model all earlier ones.

    >>> visible_pairs((1, 2), markov=True), visible_pairs((1, 2), markov=False)
    (17, 21)
    """
    lengths = [s * s for s in scale_sizes]
    seen = lengths if markov else [sum(lengths[: k + 1]) for k in range(len(lengths))]
    return sum(n * m for n, m in zip(lengths, seen, strict=True))


def sampling_flops(
    scale_sizes: Sequence[int],
    *,
    markov: bool,
    width: int,
    num_layers: int,
    mlp_ratio: float,
    codebook_size: int,
    codebook_dim: int,
    shared_adaln: bool,
) -> int:
    """Multiplications and additions of all forwards of one image, without guidance and without pixels.

    2 (L (n (4 + 2 r) w^2 + d w + w V) + 2 n w P + (6 m + 2) w^2), with L tokens, n layers, width w, r the ratio of the
    feed-forward, d the width of a code, V codes, P visible pairs, and m modulations (n, or 1 where they are shared).
    Guidance adds the same again for the scales that it is on at.
    """
    tokens, squared = sum(s * s for s in scale_sizes), width**2
    per_token = num_layers * (4 + 2 * mlp_ratio) * squared + codebook_dim * width + width * codebook_size
    attention = 2 * num_layers * width * visible_pairs(scale_sizes, markov=markov)
    modulations = (6 * (1 if shared_adaln else num_layers) + 2) * squared
    return round(2 * (tokens * per_token + attention + modulations))
