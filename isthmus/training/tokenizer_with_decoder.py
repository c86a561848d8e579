"""What trains together: diffusion tokenizer, flow decoder, and the heads that only training needs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.functional.shapes import Images
from isthmus.layers.token_canvas import Painted, shown_at
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer, DiffusionTokenizerOutput
from isthmus.models.flow_decoder import Canvas, FlowDecoder
from isthmus.schedulers.flow_matching import FlowMatchingScheduler
from isthmus.training.diffusion_losses import DiffusionTrainingOutput


class AlignmentHead(nn.Module):
    """Inner features of the decoder to those of a frozen network, place by place (spec of D-AR, 1.5.4).

    Args:
        width: of the decoder.
        feature_width: of the frozen network.
        side: places per side; finer features are averaged first.
        hidden_width: of its two hidden layers.
    """

    def __init__(self, width: int, feature_width: int, side: int, *, hidden_width: int = 2048):
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            nn.Linear(width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, hidden_width),
            nn.SiLU(),
            nn.Linear(hidden_width, feature_width),
        )

    def forward(self, features: Float[Tensor, "rows width r c"]) -> Float[Tensor, "rows feature_width side side"]:
        """Project the features, averaged to `side` x `side` places."""
        pooled = F.adaptive_avg_pool2d(features, self.side)
        return self.layers(pooled.movedim(1, -1)).movedim(-1, 1)


class PrefixReadout(nn.Module):
    """A small image from the tokens of the first g groups, for every g, by nothing but a linear map.

    It gives every token a reason to say something about the image before the decoder has learnt to listen. Codes add
    up over groups; conditions already know the earlier groups, so each group is read alone.

    Args:
        num_groups: groups of tokens.
        group_width: numbers in a group: tokens times their width.
        size: side of the small image in pixels.
        cumulative: add up over groups.
    """

    def __init__(self, num_groups: int, group_width: int, size: int, *, cumulative: bool):
        super().__init__()
        self.size, self.cumulative = size, cumulative
        self.weight = nn.Parameter(torch.empty(num_groups, group_width, 3 * size**2))
        self.bias = nn.Parameter(torch.zeros(num_groups, 3 * size**2))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b groups 3 size size"]:
        """Images of side `size` from (b, n, width) codes or conditions."""
        groups = tokens.unflatten(1, (len(self.weight), -1)).flatten(2).to(self.weight.dtype)
        pixels = torch.einsum("bgi,gip->bgp", groups, self.weight)
        if self.cumulative:
            pixels = pixels.cumsum(dim=1)
        return (pixels + self.bias).unflatten(2, (3, self.size, self.size))


class TokenizerWithDecoder(nn.Module):
    """Tokenizer and decoder as one network for the optimizer, the averages and the processes.

    Args:
        image_tokenizer, decoder: what is trained and saved.
        scheduler: noise levels and the tokens that drive them.
        alignment: head of the alignment loss, or None.
        alignment_layer: decoder blocks before the features it reads.
        readout: head of the read-out loss, or None.
        reads_condition: whether the read-out reads conditions instead of codes.
    """

    def __init__(
        self,
        image_tokenizer: DiffusionTokenizer,
        decoder: FlowDecoder,
        scheduler: FlowMatchingScheduler,
        *,
        alignment: AlignmentHead | None = None,
        alignment_layer: int = 0,
        readout: PrefixReadout | None = None,
        reads_condition: bool = False,
    ):
        super().__init__()
        self.image_tokenizer, self.decoder, self.scheduler = image_tokenizer, decoder, scheduler
        self.alignment, self.alignment_layer = alignment, alignment_layer
        self.readout, self.reads_condition = readout, reads_condition

    def forward(
        self, images: Images, raw_t: Float[Tensor, "b k"], noise: Float[Tensor, "b k 3 h w"], *, quantize: bool = True
    ) -> DiffusionTrainingOutput:
        """Encode every image once, and predict the velocity at its k noise levels.

        Args:
            images: (b, 3, h, w) in [-1, 1].
            raw_t: unshifted times: 0 = noise, 1 = image.
            noise: standard normal.
            quantize: False passes the latents on (continuous warm-up).
        """
        encoded = self.image_tokenizer(images, quantize=quantize)
        levels = raw_t.shape[1]
        starts, t = self.scheduler.window_of(raw_t.flatten()), self.scheduler.shift(raw_t.float().flatten())
        repeated, noise = images.repeat_interleave(levels, dim=0), noise.flatten(0, 1)
        x_t = self.scheduler.add_noise(repeated, noise, t)
        window = windows(encoded.condition, starts, self.scheduler.tokens_per_step)
        times, keys = self.decoder.embed_times(t), self.decoder.attend_to(window)
        ends = starts + self.scheduler.tokens_per_step
        canvas = canvases(self.decoder.paint(encoded.condition, 0), ends, self.image_tokenizer.tokens_per_group)
        aligned = None
        if self.alignment is None:
            velocity = self.decoder.velocity(x_t, times, keys, canvas)
        else:
            tapped = self.decoder.velocity_and_features(x_t, times, keys, canvas, layer=self.alignment_layer)
            velocity, aligned = tapped.velocity, self.alignment(tapped.features)
        velocity = velocity.float()
        return DiffusionTrainingOutput(
            velocity=velocity,
            target=self.scheduler.velocity_target(repeated, noise),
            jump=self.scheduler.jump(x_t, velocity, t),
            token_ids=encoded.token_ids,
            latents=encoded.latents,
            codebook_errors=encoded.codebook_errors,
            commitment_errors=encoded.commitment_errors,
            ends=ends.view_as(raw_t),
            aligned=aligned,
            readout=self._read(encoded),
            canvas=None if canvas is None else self.scheduler.to_image(shown_at(canvas, *images.shape[2:]).float()),
        )

    def _read(self, encoded: DiffusionTokenizerOutput) -> Float[Tensor, "b groups 3 s s"] | None:
        if self.readout is None:
            return None
        return self.readout(encoded.condition if self.reads_condition else encoded.quantized)


def canvases(painted: Painted | None, ends: Int[Tensor, " rows"], group: int) -> Canvas | None:
    """What the tokens of whole groups up to `ends` have painted, for every noise level; None without a canvas."""
    if painted is None:
        return None
    levels = len(ends) // len(painted)
    last = -(-ends // group) * group - 1
    images = torch.arange(len(painted), device=ends.device).repeat_interleave(levels)
    return painted.cumsum(dim=1)[images, last]


def windows(
    condition: Float[Tensor, "b n c"], starts: Int[Tensor, " rows"], length: int
) -> Float[Tensor, "rows length c"]:
    """Rows [start, start + length) of the condition for every noise level; image i has the levels i * k + j.

    >>> windows(torch.arange(4.0).view(1, 4, 1), torch.tensor([0, 2]), 2).flatten(1).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    levels = len(starts) // len(condition)
    columns = starts.unsqueeze(1) + torch.arange(length, device=starts.device)
    images = torch.arange(len(condition), device=starts.device).repeat_interleave(levels).unsqueeze(1)
    return condition[images, columns]
