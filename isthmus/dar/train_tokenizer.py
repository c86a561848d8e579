"""What trains a diffusion tokenizer and its pixel decoder: networks, measures, codes. The loop is that of
`isthmus.training.train_tokenizer`; `tokenizer_losses` has the losses.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from isthmus.dar.decoder import Canvas, FlowDecoder, Painted, shown_at
from isthmus.dar.decoding import image_noise
from isthmus.dar.runs import DiffusionTokenizerRun, FlowDecoderModel
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer, DiffusionTokenizerOutput
from isthmus.dar.tokenizer_losses import (
    DiffusionTrainingOutput,
    diffusion_losses,
    feature_shape,
    frozen_features,
    group_spans,
    raw_times,
    training_noise,
)
from isthmus.data.batches import EvaluationImages
from isthmus.data.huggingface import ImageStream
from isthmus.data.source import ImageSource
from isthmus.data.views import Batch, Sample
from isthmus.errors import UserError
from isthmus.nn.draws import REVIVE, stream
from isthmus.nn.perceptual import psnr
from isthmus.nn.quantization import k_means
from isthmus.nn.saved_model import without_values
from isthmus.nn.shapes import Images
from isthmus.pictures import spread
from isthmus.pipelines.folder import model_folder
from isthmus.published import perceptual_distance
from isthmus.training.arguments import given
from isthmus.training.codebook import CodebookUsage, code_counts
from isthmus.training.cost import num_parameters, report, training_cost
from isthmus.training.optim import ExponentialMovingAverage
from isthmus.training.previews import PREVIEW_SEED, preview_images, save_reconstructions
from isthmus.training.saved_networks import TOKENIZER_FOLDER, averaged_model, export_tokenizer, refuse_contradictions
from isthmus.training.train_tokenizer import TokenizerLosses, TokenizerTask


@torch.no_grad()
def first_codes(model: DiffusionTokenizer, images: Images, count: int, *, seed: int) -> Float[Tensor, "k d"]:
    """A codebook from the encoder's outputs on `images`: k-means, brought back to unit length."""
    was_training = model.training
    # running statistics, and none are changed
    model.eval()
    latents = torch.cat([model.latents(part).flatten(0, 1) for part in images.split(64)])
    model.train(was_training)
    return F.normalize(k_means(latents, count, seed=seed), dim=-1)


def random_latents(latents: Float[Tensor, "b n d"], count: int, *, seed: int, step: int) -> Float[Tensor, "k d"]:
    """`count` of these latents, each once before one comes twice: two codes on one would stay together."""
    rows = latents.flatten(0, 1)
    order = torch.from_numpy(stream(seed, REVIVE, step).permutation(len(rows))).to(rows.device)
    return rows[order[torch.arange(count, device=rows.device) % len(rows)]]


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


logger = logging.getLogger("isthmus")

DECODER_FOLDER, SCHEDULER_FOLDER = "decoder", "scheduler"


@dataclass(frozen=True)
class TokenizerParts:
    """Everything that turns images into tokens and tokens into images."""

    image_tokenizer: DiffusionTokenizer
    decoder: FlowDecoder
    scheduler: FlowMatchingScheduler


def load_parts(path: str) -> TokenizerParts:
    """Tokenizer, decoder and scheduler in a run folder, a pipeline folder, or a model on the hub.

    Raises:
        UserError: there is none, it is of another family, or it does not load strictly.
    """
    folder = model_folder(path)
    for name in (TOKENIZER_FOLDER, DECODER_FOLDER):
        if not (folder / name / "config.json").is_file():
            raise UserError(
                "a D-AR tokenizer is the folder of a finished `isthmus train tokenizer` (or of a pipeline), got "
                f"{path}, which holds no {name}. Finish the run first: the same command continues it."
            )
    if not (folder / SCHEDULER_FOLDER / "scheduler_config.json").is_file():
        raise UserError(f"{path} lacks scheduler/scheduler_config.json. Copy or download it whole.")
    return TokenizerParts(
        DiffusionTokenizer.from_pretrained(folder / TOKENIZER_FOLDER),
        FlowDecoder.from_pretrained(folder / DECODER_FOLDER),
        FlowMatchingScheduler.from_pretrained(folder / SCHEDULER_FOLDER),
    )


# what FlowDecoder takes where nothing is said
_DECODER_PATCH = 8


def build_networks(run: DiffusionTokenizerRun) -> TokenizerWithDecoder:
    """Tokenizer, decoder, scheduler and heads of a run.

    Raises:
        UserError: sizes do not fit each other, or an argument contradicts the saved model.
    """
    parts = build_parts(run)
    tokenizer, decoder = parts.image_tokenizer, parts.decoder
    size = tokenizer.config["image_size"]
    if run.loss.times == "balanced":
        group_spans(tokenizer.config["num_groups"], run.loss.latest_time)
    if run.freeze_encoder:
        for name, parameter in tokenizer.named_parameters():
            parameter.requires_grad_(name.startswith(("from_code.", "token_position", "condition_layers.")))
    if run.checkpoint_activations:
        tokenizer.enable_gradient_checkpointing()
        decoder.enable_gradient_checkpointing()
    return TokenizerWithDecoder(
        tokenizer,
        decoder,
        parts.scheduler,
        alignment=alignment_head(run, decoder, size) if run.loss.alignment else None,
        alignment_layer=run.loss.alignment_layer,
        readout=readout_head(run, tokenizer) if run.loss.readout else None,
        reads_condition=run.loss.readout_from == "condition",
    )


def build_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """Tokenizer, decoder and scheduler of a run: new, or from a saved model.

    Raises:
        UserError: sizes do not fit each other, or an argument contradicts the saved model.
    """
    parts = saved_parts(run) if run.from_model else new_parts(run)
    check_fit(run, parts.image_tokenizer.config["image_size"], parts.decoder)
    return parts


def new_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """Untrained networks."""
    tokenizer = DiffusionTokenizer(**given(run.model))
    arguments = decoder_arguments(run.decoder, tokenizer)
    decoder = FlowDecoder(condition_width=tokenizer.config["condition_width"], **arguments)
    return TokenizerParts(tokenizer, decoder, scheduler_for(tokenizer, given(run.flow)))


def saved_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """The networks of `from_model`; what the run says of the diffusion takes the place of what is saved."""
    parts = load_parts(run.from_model)
    refuse_contradictions(parts.image_tokenizer, given(run.model), run.from_model)
    wanted = decoder_arguments(run.decoder, parts.image_tokenizer, parts.decoder)
    refuse_contradictions(parts.decoder, wanted, run.from_model, options="decoder")
    saved = {name: parts.scheduler.config[name] for name in ("num_inference_steps", "time_shift", "data_std", "solver")}
    return TokenizerParts(
        parts.image_tokenizer, parts.decoder, scheduler_for(parts.image_tokenizer, saved | given(run.flow))
    )


def scheduler_for(tokenizer: DiffusionTokenizer, settings: Mapping[str, Any]) -> FlowMatchingScheduler:
    """The scheduler of a tokenizer's tokens: as many steps as groups where nothing else is said."""
    config = tokenizer.config
    return FlowMatchingScheduler(
        **{
            "num_inference_steps": config["num_groups"],
            "num_groups": config["num_groups"],
            "num_tokens": config["num_tokens"],
            "tokens_per_step": tokenizer.tokens_per_step,
            **settings,
        }
    )


def decoder_arguments(
    settings: FlowDecoderModel, tokenizer: DiffusionTokenizer, saved: FlowDecoder | None = None
) -> dict[str, Any]:
    """Named arguments of `FlowDecoder`; positions and canvas are those of the tokenizer's patches and tokens."""
    arguments, image_size = given(settings), tokenizer.config["image_size"]
    if "canvas" in arguments:
        arguments["canvas_tokens"] = tokenizer.config["num_tokens"] if arguments.pop("canvas") else None
    if "position_table" in arguments:
        patch = saved.config["patch_size"] if saved else arguments.get("patch_size", _DECODER_PATCH)
        arguments["position_table"] = image_size // patch if arguments["position_table"] else None
    return arguments


def check_fit(run: DiffusionTokenizerRun, image_size: int, decoder: FlowDecoder) -> None:
    """Raise UserError where the decoder does not fit the images or the losses."""
    patch = decoder.config["patch_size"]
    if image_size % patch:
        raise UserError(
            f"model.image_size must be a multiple of decoder.patch_size, got {image_size} and {patch}. Change one."
        )
    if run.loss.canvas and decoder.canvas is None:
        raise UserError(
            f"loss.canvas needs a decoder with a canvas, got {run.loss.canvas} without one. Set --loss.canvas 0 or "
            "--decoder.canvas True."
        )
    layers = decoder.config["num_layers"]
    if run.loss.alignment and run.loss.alignment_layer > layers:
        raise UserError(
            f"loss.alignment_layer must be one of the decoder's {layers} blocks, got {run.loss.alignment_layer}."
        )


def alignment_head(run: DiffusionTokenizerRun, decoder: FlowDecoder, image_size: int) -> AlignmentHead:
    """Head to the features of the frozen network, on the coarser of the two grids."""
    width, side = feature_shape(frozen_features(run.loss), image_size)
    return AlignmentHead(decoder.config["width"], width, min(side, image_size // decoder.config["patch_size"]))


def readout_head(run: DiffusionTokenizerRun, tokenizer: DiffusionTokenizer) -> PrefixReadout:
    """Head that reads small images off codes or conditions."""
    from_codes = run.loss.readout_from == "codes"
    width = tokenizer.config["codebook_dim" if from_codes else "condition_width"]
    return PrefixReadout(
        tokenizer.config["num_groups"],
        tokenizer.tokens_per_group * width,
        run.loss.readout_size,
        cumulative=from_codes,
    )


_BATCH = 32

Decode = Callable[[Float[Tensor, "b n d"], Sequence[int]], Images]
"""Codes of all tokens and the numbers of the images, which decide about their noise, to images in [-1, 1]."""


@dataclass(frozen=True)
class DiffusionTokenizerScores:
    """Measurements on held-out images.

    Attributes:
        num_images: images measured.
        psnr: mean over images, dB.
        psnr_shuffled: the same of decodes from another image's codes, under the same noise.
        usage: share of the codebook that any group uses; 1 where nothing was quantised.
        perplexity_by_group: exp(entropy) of the codes of each group; empty where nothing was quantised.
    """

    num_images: int
    psnr: float
    psnr_shuffled: float
    usage: float
    perplexity_by_group: list[float]

    @property
    def gap(self) -> float:
        """What the right codes are worth, dB: near 0 where the decoder ignores them, however low the flow loss is.

        0 for a single image, which has no other's codes to be compared with.
        """
        return self.psnr - self.psnr_shuffled

    def as_floats(self) -> dict[str, float]:
        """Flat names for a log line."""
        values = {"psnr": self.psnr, "psnr_shuffled": self.psnr_shuffled, "gap": self.gap, "usage": self.usage}
        values |= {f"perplexity_group{k}": value for k, value in enumerate(self.perplexity_by_group)}
        return {f"val/{name}": value for name, value in values.items()}


@torch.no_grad()
def diffusion_tokenizer_scores(
    tokenizer: DiffusionTokenizer, decode: Decode, images: "Dataset[Sample]", *, limit: int, quantize: bool = True
) -> DiffusionTokenizerScores:
    """Measure a tokenizer and its decoder on `limit` images of a data set, evenly spread over it.

    Every image is decoded twice: from its own codes, and from those of the image half the set away, which is of another
    class where the set is sorted. Without `quantize` the latents take the place of codes, as in training before there
    is a codebook.
    """
    chosen = spread(len(images), limit)  # pyright: ignore[reportArgumentType]  map-style data sets have a length
    batches = [chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH)]

    def pixels(numbers: Sequence[int]) -> Images:
        return torch.stack([torch.as_tensor(images[i]["image"]) for i in numbers]).to(tokenizer.device)

    read = [latents_or_codes(tokenizer, pixels(numbers), quantize=quantize) for numbers in batches]
    codes, ids = torch.cat([codes for codes, _ in read]), [ids.cpu() for _, ids in read if ids is not None]
    others = codes.roll(len(chosen) // 2, dims=0)
    own, shuffled = [], []
    for numbers, right, wrong in zip(batches, codes.split(_BATCH), others.split(_BATCH), strict=True):
        targets = pixels(numbers)
        own.append(psnr(decode(right, numbers), targets).cpu())
        shuffled.append(psnr(decode(wrong, numbers), targets).cpu())
    usage, perplexity = _usage(tokenizer, ids) if ids else (1.0, [])
    return DiffusionTokenizerScores(
        num_images=len(chosen),
        psnr=float(torch.cat(own).mean()),
        psnr_shuffled=float(torch.cat(shuffled).mean()),
        usage=usage,
        perplexity_by_group=perplexity,
    )


def latents_or_codes(
    tokenizer: DiffusionTokenizer, images: Images, *, quantize: bool
) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n"] | None]:
    """What the causal stack reads, and the token ids behind it where there are any."""
    if not quantize or tokenizer.codebook is None:
        return tokenizer.latents(images), None
    encoded = tokenizer.encode(images)
    return encoded.quantized, encoded.token_ids


def by_group(tokenizer: DiffusionTokenizer, token_ids: Int[Tensor, "b n"]) -> list[Int[Tensor, "b g"]]:
    """The token ids of each group."""
    return list(token_ids.split(tokenizer.tokens_per_group, dim=1))


def _usage(tokenizer: DiffusionTokenizer, token_ids: Sequence[Tensor]) -> tuple[float, list[float]]:
    counts = code_counts(by_group(tokenizer, torch.cat(list(token_ids))), tokenizer.config["codebook_size"])
    usage = CodebookUsage(*counts.shape, decay=0.0)
    usage.update(counts)
    return float((counts.sum(dim=0) > 0).float().mean()), usage.perplexity().tolist()


def decoding(parts: TokenizerParts) -> Decode:
    """Codes to images with the scheduler's own steps and solver, from noise that belongs to the image's number."""

    def decode(quantized: Float[Tensor, "b n d"], numbers: Sequence[int]) -> Images:
        *_, last = decode_steps(parts, quantized, numbers)
        return last.clamp(-1, 1)

    return decode


@torch.no_grad()
def decode_steps(parts: TokenizerParts, quantized: Float[Tensor, "b n d"], numbers: Sequence[int]) -> Iterator[Images]:
    """The image that each solver step would jump to, then the image itself.

    `isthmus.dar.decoding` walks the same way from token ids; while a codebook does not exist yet there are
    none, only the latents.
    """
    scheduler, decoder = parts.scheduler, parts.decoder
    size = parts.image_tokenizer.config["image_size"]
    condition = parts.image_tokenizer.condition_vectors(quantized)
    painted, group = decoder.paint(condition, 0), parts.image_tokenizer.tokens_per_group
    x, previous = image_noise([(PREVIEW_SEED, number) for number in numbers], size, size).to(decoder.device), None
    times = scheduler.times().to(decoder.device)
    for index, (start, end) in enumerate(scheduler.windows()):
        t = times[index].expand(len(x))
        canvas = canvases(painted, torch.full((len(x),), end, device=x.device), group)
        velocity = decoder(x, t, condition[:, start:end], canvas)
        yield scheduler.jump(x, velocity, t)
        x, previous = scheduler.step(velocity, previous, index, x), velocity
    yield scheduler.to_image(x)


def frozen_networks(run: DiffusionTokenizerRun, device: torch.device) -> tuple[nn.Module | None, nn.Module | None]:
    """Perceptual distance and alignment features, each where it has a weight."""
    loss = run.loss
    distance = teacher = None
    if loss.perceptual:
        taps = {"taps": loss.perceptual_taps} if loss.perceptual_network == "lite0" else {}
        distance = perceptual_distance(loss.perceptual_network, lpips_weights=loss.lpips_weights, **taps).to(device)
    if loss.alignment:
        teacher = frozen_features(loss).to(device)
    return distance, teacher


@dataclass(frozen=True)
class NoiseLevels:
    """Levels of noise for one part of a batch.

    Attributes:
        raw_t: unshifted times.
        counted_tokens: tokens that the codebook errors count, mean over the parts of the batch and all processes.
    """

    raw_t: Float[Tensor, "b k"]
    counted_tokens: Float[Tensor, ""]


class DiffusionTokenizerTask(TokenizerTask):
    """`DiffusionTokenizer` with its `FlowDecoder`, as the training loop asks for them."""

    level = "group"

    def __init__(self, run: DiffusionTokenizerRun, accelerator: Accelerator):
        self.run, self._accelerator = run, accelerator
        self.network = build_networks(run).to(accelerator.device).train()
        self.tokenizer, self._scheduler = self.network.image_tokenizer, self.network.scheduler
        if run.freeze_encoder and self.tokenizer.latent_batch_norm is not None:
            # its running statistics are no parameters, and they decide about token ids as weights do
            self.tokenizer.latent_batch_norm.eval()
        config = self.tokenizer.config
        self.image_size: int = config["image_size"]
        self.codebook = "image_tokenizer.codebook.weight" if config["quantized"] else None
        self.codebook_size: int = config["codebook_size"]
        self.num_levels: int = config["num_groups"]
        # after no continuous steps it stays the random one that it is
        self.starts_codebook_at = None if run.from_model else run.continuous_steps or None
        self._distance, self._teacher = frozen_networks(run, accelerator.device)

    @staticmethod
    def describe(run: DiffusionTokenizerRun) -> str:
        """Settings, size, cost and memory of a run, without heads and frozen networks of optional losses.

        No weight is allocated.
        """
        with without_values():
            parts = build_parts(run)
            network = TokenizerWithDecoder(parts.image_tokenizer, parts.decoder, parts.scheduler)
        config = parts.image_tokenizer.config
        side, levels = config["image_size"], run.loss.noise_levels
        tokenizer, decoder = (f"{num_parameters(part) / 1e6:.2f}M" for part in (parts.image_tokenizer, parts.decoder))

        def forward(network: TokenizerWithDecoder) -> object:
            return network(torch.zeros(1, 3, side, side), torch.zeros(1, levels), torch.zeros(1, levels, 3, side, side))

        about = (
            f"{config['num_tokens']} tokens in {config['num_groups']} groups, {config['codebook_size']} codes; images "
            f"of {side} px, {levels} noise level{'s' if levels > 1 else ''} each; tokenizer {tokenizer}, decoder "
            f"{decoder}"
        )
        return report(run, about, training_cost(network, forward))

    def draw(self, parts: Sequence[Batch]) -> Sequence[NoiseLevels]:
        """Noise levels; the codebook losses are means over the tokens that those of the whole batch count."""
        run, scheduler, device = self.run, self._scheduler, self._accelerator.device
        kind, latest, groups = run.loss.times, run.loss.latest_time, self.num_levels
        raw_t = [
            raw_times(
                part["position"], run.loss.noise_levels, kind=kind, num_groups=groups, latest=latest, seed=run.seed
            ).to(device)
            for part in parts
        ]
        ends = torch.cat([scheduler.window_of(times.flatten()) for times in raw_t]) + scheduler.tokens_per_step
        counted = cast(Tensor, self._accelerator.reduce(ends.sum().float() / len(raw_t), "mean"))
        return [NoiseLevels(times, counted) for times in raw_t]

    def losses(
        self, model: nn.Module, batch: Batch, drawn: NoiseLevels, *, step: int, quantize: bool
    ) -> TokenizerLosses:
        """Losses of one part of a batch."""
        run, device, size = self.run, self._accelerator.device, self.image_size
        images = batch["image"].to(device)
        noise = training_noise(batch["position"], run.loss.noise_levels, (size, size), seed=run.seed, device=device)
        output = model(images, drawn.raw_t, noise, quantize=quantize)
        named = diffusion_losses(
            output,
            images,
            run.loss,
            data_std=self._scheduler.config["data_std"],
            counted_tokens=drawn.counted_tokens,
            distance=self._distance,
            teacher=self._teacher,
        )
        token_ids = [] if output.token_ids is None else by_group(self.tokenizer, output.token_ids)
        return TokenizerLosses(named=named, token_ids=token_ids, latents=output.latents)

    def first_codes(self, images: Images) -> Float[Tensor, "k d"]:
        """K-means over latents."""
        return first_codes(self.tokenizer, images, self.codebook_size, seed=self.run.seed)

    def new_codes(self, latents: Float[Tensor, "b n d"], count: int, step: int) -> Float[Tensor, "k d"]:
        """Some of these latents."""
        return random_latents(latents, count, seed=self.run.seed, step=step)

    def averaged(self, ema: ExponentialMovingAverage) -> TokenizerParts:
        """Copies of tokenizer and decoder that hold the averages; the heads stay behind."""
        return TokenizerParts(
            averaged_model(self.tokenizer, ema, prefix="image_tokenizer."),
            averaged_model(self.network.decoder, ema, prefix="decoder."),
            self._scheduler,
        )

    def measure(self, model: TokenizerParts, views: EvaluationImages, *, quantize: bool) -> dict[str, float]:
        """PSNR with the solver that the saved model will have, from the right codes and the wrong ones; usage.

        Says in words when the decoder does not listen to the codes.
        """
        limit, threshold = self.run.validation_images, self.run.gap_warning
        scores = diffusion_tokenizer_scores(
            model.image_tokenizer, decoding(model), views, limit=limit, quantize=quantize
        )
        if scores.gap < threshold:
            logger.warning(
                "an image's own codes decode %.2f dB better than another image's (threshold %.2f dB): the decoder "
                "hardly listens to the codes, whatever the flow loss says. Try more steps, --loss.jump, "
                "--loss.readout, more --loss.noise-levels or --loss.times balanced.",
                scores.gap,
                threshold,
            )
        return scores.as_floats()

    @torch.no_grad()
    def save_previews(
        self, model: TokenizerParts, views: EvaluationImages, folder: Path, step: int, *, quantize: bool
    ) -> None:
        """Held-out images: where each solver step would jump to, then the result."""
        images, numbers = preview_images(views)
        images = images.to(model.decoder.device)
        quantized, _ = latents_or_codes(model.image_tokenizer, images, quantize=quantize)
        *jumps, decoded = decode_steps(model, quantized, numbers)
        stages = {f"step {k}": jump for k, jump in enumerate(jumps, 1)}
        save_reconstructions({**stages, "decoded": decoded}, images, folder, step)

    def export(self, model: TokenizerParts, source: ImageSource | ImageStream) -> Path:
        """Write scheduler, decoder and tokenizer into the run's folder."""
        # the tokenizer last
        parts = {
            SCHEDULER_FOLDER: model.scheduler,
            DECODER_FOLDER: model.decoder,
            TOKENIZER_FOLDER: model.image_tokenizer,
        }
        return export_tokenizer(self._accelerator, self.run, source, parts)
