"""The objective of the diffusion tokenizer as pure functions: flow matching, codebook, and the optional terms.

Source: Gao and Shou, "D-AR: Diffusion via Autoregressive Models", section 3.1 (spec of D-AR, 1.3, 1.6 and 1.9).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.functional.shapes import Images
from isthmus.training.dar_config import DiffusionTokenizerLoss


@dataclass
class DiffusionTrainingOutput:
    """What one pass of tokenizer and decoder gives; row i * k + j of `rows` is noise level j of image i.

    Attributes:
        velocity, target: (rows, 3, h, w), the decoder's velocity and the true one, fp32.
        jump: (rows, 3, h, w), the image that one straight step to the end would give.
        token_ids: (b, n); None where quantisation was left out.
        latents: (b, n, d), unit vectors before quantisation.
        codebook_errors, commitment_errors: (b, n), squared errors of each token.
        ends: (b, k), number of tokens up to the end of the window that drives each noise level.
        aligned: (rows, c, r, r), inner features of the decoder as the frozen network's; None where left out.
        readout: (b, groups, 3, s, s), small images read off the first groups of tokens; None where left out.
        canvas: (rows, 3, h, w), what the tokens so far have painted, as images; None for decoders without a canvas.
    """

    velocity: Float[Tensor, "rows 3 h w"]
    target: Float[Tensor, "rows 3 h w"]
    jump: Float[Tensor, "rows 3 h w"]
    token_ids: Int[Tensor, "b n"] | None
    latents: Float[Tensor, "b n d"]
    codebook_errors: Float[Tensor, "b n"]
    commitment_errors: Float[Tensor, "b n"]
    ends: Int[Tensor, "b k"]
    aligned: Float[Tensor, "rows c r r"] | None = None
    readout: Float[Tensor, "b groups 3 s s"] | None = None
    canvas: Float[Tensor, "rows 3 h w"] | None = None


def diffusion_losses(
    output: DiffusionTrainingOutput,
    images: Images,
    config: DiffusionTokenizerLoss,
    *,
    data_std: float,
    counted_tokens: Float[Tensor, ""] | None = None,
    distance: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Losses of one part of a batch; those under `weighted/` add up to what is minimised.

    Args:
        output: of `TokenizerWithDecoder`.
        images: (b, 3, h, w) in [-1, 1].
        config: weights.
        data_std: factor between images and diffusion states.
        counted_tokens: what the codebook errors are divided by; None takes the tokens that this part counts. With
            several parts or processes it is the mean over all of them, so that all together give the loss of the whole.
        distance: perceptual distance, where it has a weight.
        teacher: frozen features, where alignment has a weight.
    """
    levels = output.ends.shape[1]
    repeated = images.repeat_interleave(levels, dim=0)
    # the jump is measured even where it is not trained on: its error is what one sees of a diffusion's progress
    losses = {"flow": flow_loss(output.velocity, output.target, data_std), "jump": F.mse_loss(output.jump, repeated)}
    losses["weighted/flow"] = config.flow * losses["flow"]
    if config.jump:
        losses["weighted/jump"] = config.jump * losses["jump"]
    if output.token_ids is not None:
        for name, errors in (("codebook", output.codebook_errors), ("commitment", output.commitment_errors)):
            losses[name] = prefix_mean(errors, output.ends, counted_tokens)
            losses[f"weighted/{name}"] = getattr(config, name) * losses[name]
    if distance is not None:
        losses["perceptual"] = distance(output.jump, repeated).mean()
        losses["weighted/perceptual"] = config.perceptual * losses["perceptual"]
    if output.aligned is not None and teacher is not None:
        losses["alignment"] = alignment_loss(output.aligned, teacher(images).repeat_interleave(levels, dim=0))
        losses["weighted/alignment"] = config.alignment * losses["alignment"]
    if output.canvas is not None:
        losses["canvas"] = F.mse_loss(output.canvas, repeated)
        if config.canvas:
            losses["weighted/canvas"] = config.canvas * losses["canvas"]
    if output.readout is not None:
        losses["readout"] = readout_loss(output.readout, images)
        losses["weighted/readout"] = config.readout * losses["readout"]
    return losses


def flow_loss(
    velocity: Float[Tensor, "rows 3 h w"], target: Float[Tensor, "rows 3 h w"], data_std: float
) -> Float[Tensor, ""]:
    """mean((v_pred - v)^2) / data_std^2, which is measured in images, not in states."""
    return F.mse_loss(velocity.float(), target) / data_std**2


def prefix_mean(
    errors: Float[Tensor, "b n"], ends: Int[Tensor, "b k"], counted_tokens: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Mean over the tokens before `ends`, each level of an image counting its own: later tokens did nothing there.

    >>> prefix_mean(torch.tensor([[1.0, 5.0], [3.0, 7.0]]), torch.tensor([[1], [2]]))
    tensor(3.6667)
    """
    counts = (torch.arange(errors.shape[1], device=errors.device) < ends.unsqueeze(-1)).sum(dim=1)
    return (counts * errors).sum() / (counts.sum() if counted_tokens is None else counted_tokens)


def alignment_loss(
    projected: Float[Tensor, "rows c r r"], features: Float[Tensor, "rows c rows_in columns_in"]
) -> Float[Tensor, ""]:
    """1 - cosine over channels, mean over places (REPA, Yu et al. 2024); features are averaged to the same grid."""
    features = F.adaptive_avg_pool2d(features, (projected.shape[-2], projected.shape[-1]))
    return 1 - F.cosine_similarity(projected.float(), features.float(), dim=1).mean()


def readout_loss(readout: Float[Tensor, "b groups 3 s s"], images: Images) -> Float[Tensor, ""]:
    """Squared error of every number of groups' small image; the target is the image averaged to that size."""
    target = F.adaptive_avg_pool2d(images, (readout.shape[-2], readout.shape[-1])).unsqueeze(1)
    return F.mse_loss(readout.float(), target.expand_as(readout))
