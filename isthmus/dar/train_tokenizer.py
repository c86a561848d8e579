"""What trains a diffusion tokenizer and its pixel decoder: networks, measures, codes (losses: `tokenizer_losses`)."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.dar.decoder import Canvas, FlowDecoder, Painted, shown_at
from isthmus.dar.decoding import image_noise
from isthmus.dar.runs import DiffusionTokenizerRun, FlowDecoderModel
from isthmus.dar.scheduler import FlowMatchingScheduler
from isthmus.dar.tokenizer import DiffusionTokenizer
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
from isthmus.data.source import ImageSource, ImageStream
from isthmus.data.views import Batch
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
from isthmus.training.codebook import code_counts, perplexity
from isthmus.training.cost import num_parameters, report, training_cost
from isthmus.training.optim import ExponentialMovingAverage
from isthmus.training.previews import PREVIEW_SEED, preview_images, save_reconstructions
from isthmus.training.saved_networks import TOKENIZER_FOLDER, averaged_model, export_tokenizer, refuse_contradictions
from isthmus.training.train_tokenizer import TokenizerLosses, TokenizerTask

logger = logging.getLogger("isthmus")

_BATCH = 32


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

    Features on more than `side` places per side are averaged first.
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

    It gives every token a reason to say something about the image before the decoder has learnt to listen. Codes are
    read where it is `cumulative`, and add up over groups; conditions know the earlier groups, so each is read alone.

    `group_width` counts the numbers in a group, tokens times their width; `size` is the side of the image in pixels.
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

    The heads of the losses `alignment` (of features behind so many decoder blocks) and `readout` are trained with them,
    and not saved.
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
    ):
        super().__init__()
        self.image_tokenizer, self.decoder, self.scheduler = image_tokenizer, decoder, scheduler
        self.alignment, self.alignment_layer, self.readout = alignment, alignment_layer, readout

    def forward(
        self, images: Images, raw_t: Float[Tensor, "b k"], noise: Float[Tensor, "b k 3 h w"], *, quantize: bool = True
    ) -> DiffusionTrainingOutput:
        """Encode every image once, and predict the velocity at its k noise levels, unshifted times of 0 = noise to 1.

        Without `quantize` the latents are passed on (continuous warm-up).
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
            layer = self.alignment_layer
            velocity, features = self.decoder.velocity_and_features(x_t, times, keys, canvas, layer=layer)
            aligned = self.alignment(features)
        velocity = velocity.float()
        readout = None
        if self.readout is not None:
            readout = self.readout(encoded.quantized if self.readout.cumulative else encoded.condition)
        return DiffusionTrainingOutput(
            velocity=velocity,
            target=self.scheduler.velocity_target(repeated, noise),
            jump=self.scheduler.jump(x_t, velocity, t),
            encoded=encoded,
            ends=ends.view_as(raw_t),
            aligned=aligned,
            readout=readout,
            canvas=None if canvas is None else self.scheduler.to_image(shown_at(canvas, *images.shape[2:]).float()),
        )


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

    >>> windows(torch.arange(8.0).view(2, 4, 1), torch.tensor([0, 2, 1, 2]), 2).flatten(1).int().tolist()
    [[0, 1], [2, 3], [5, 6], [6, 7]]
    """
    levels = len(starts) // len(condition)
    columns = starts.unsqueeze(1) + torch.arange(length, device=starts.device)
    images = torch.arange(len(condition), device=starts.device).repeat_interleave(levels).unsqueeze(1)
    return condition[images, columns]


@dataclass(frozen=True)
class TokenizerParts:
    """Everything that turns images into tokens and tokens into images."""

    image_tokenizer: DiffusionTokenizer
    decoder: FlowDecoder
    scheduler: FlowMatchingScheduler


def load_parts(path: str) -> TokenizerParts:
    """Tokenizer, decoder and scheduler in a run folder, a pipeline folder, or a model on the hub; UserError if none."""
    folder = model_folder(path)
    for name in (TOKENIZER_FOLDER, "decoder"):
        if not (folder / name / "config.json").is_file():
            raise UserError(
                "a D-AR tokenizer is the folder of a finished `isthmus train tokenizer` (or of a pipeline), got "
                f"{path}, which holds no {name}. Finish the run first: the same command continues it."
            )
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise UserError(f"{path} lacks scheduler/scheduler_config.json. Copy or download it whole.")
    return TokenizerParts(
        DiffusionTokenizer.from_pretrained(folder / TOKENIZER_FOLDER),
        FlowDecoder.from_pretrained(folder / "decoder"),
        FlowMatchingScheduler.from_pretrained(folder / "scheduler"),
    )


def build_networks(run: DiffusionTokenizerRun) -> TokenizerWithDecoder:
    """Tokenizer, decoder, scheduler and heads of a run. Raises UserError as `build_parts`."""
    parts, loss = build_parts(run), run.loss
    tokenizer, decoder = parts.image_tokenizer, parts.decoder
    config, alignment, readout = tokenizer.config, None, None
    if loss.times == "balanced":
        group_spans(config["num_groups"], loss.latest_time)
    if run.freeze_encoder:
        for name, parameter in tokenizer.named_parameters():
            parameter.requires_grad_(name.startswith(("from_code.", "token_position", "condition_layers.")))
    if run.checkpoint_activations:
        tokenizer.enable_gradient_checkpointing()
        decoder.enable_gradient_checkpointing()
    if loss.alignment:
        feature_width, side = feature_shape(frozen_features(loss), config["image_size"])
        side = min(side, config["image_size"] // decoder.config["patch_size"])
        alignment = AlignmentHead(decoder.config["width"], feature_width, side)
    from_codes = loss.readout_from == "codes"
    if loss.readout:
        width = tokenizer.tokens_per_group * config["codebook_dim" if from_codes else "condition_width"]
        readout = PrefixReadout(config["num_groups"], width, loss.readout_size, cumulative=from_codes)
    return TokenizerWithDecoder(
        tokenizer,
        decoder,
        parts.scheduler,
        alignment=alignment,
        alignment_layer=loss.alignment_layer,
        readout=readout,
    )


def build_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """Tokenizer, decoder and scheduler of a run: new, or saved, when the run may change the diffusion.

    Raises UserError where sizes do not fit each other, or an argument contradicts the saved model.
    """
    saved, flow = load_parts(run.from_model) if run.from_model else None, given(run.flow)
    tokenizer = saved.image_tokenizer if saved else DiffusionTokenizer(**given(run.model))
    config, wanted = tokenizer.config, decoder_arguments(run.decoder, tokenizer, saved and saved.decoder)
    if saved:
        refuse_contradictions(config, given(run.model), run.from_model)
        refuse_contradictions(saved.decoder.config, wanted, run.from_model, options="decoder")
        kept = ("num_inference_steps", "time_shift", "data_std", "solver")
        flow = {name: saved.scheduler.config[name] for name in kept} | flow
    decoder = saved.decoder if saved else FlowDecoder(condition_width=config["condition_width"], **wanted)
    tokens = {"num_groups": config["num_groups"], "num_tokens": config["num_tokens"]}
    # as many steps as groups where nothing else is said
    steps = {"num_inference_steps": config["num_groups"], "tokens_per_step": tokenizer.tokens_per_step}
    check_fit(run, config["image_size"], decoder)
    return TokenizerParts(tokenizer, decoder, FlowMatchingScheduler(**(tokens | steps | flow)))


def decoder_arguments(
    settings: FlowDecoderModel, tokenizer: DiffusionTokenizer, saved: FlowDecoder | None
) -> dict[str, Any]:
    """Named arguments of `FlowDecoder`; positions and canvas are those of the tokenizer's patches and tokens."""
    arguments = given(settings)
    if "canvas" in arguments:
        arguments["canvas_tokens"] = tokenizer.config["num_tokens"] if arguments.pop("canvas") else None
    if "position_table" in arguments:
        default = inspect.signature(FlowDecoder).parameters["patch_size"].default
        patch = saved.config["patch_size"] if saved else arguments.get("patch_size", default)
        arguments["position_table"] = tokenizer.config["image_size"] // patch if arguments["position_table"] else None
    return arguments


def check_fit(run: DiffusionTokenizerRun, image_size: int, decoder: FlowDecoder) -> None:
    """Raise UserError where the decoder does not fit the images or the losses."""
    patch, layers = decoder.config["patch_size"], decoder.config["num_layers"]
    if image_size % patch:
        raise UserError(
            f"model.image_size must be a multiple of decoder.patch_size, got {image_size} and {patch}. Change one."
        )
    if run.loss.canvas and decoder.canvas is None:
        raise UserError(
            f"loss.canvas needs a decoder with a canvas, got {run.loss.canvas} without one. Set --loss.canvas 0 or "
            "--decoder.canvas True."
        )
    if run.loss.alignment and run.loss.alignment_layer > layers:
        raise UserError(
            f"loss.alignment_layer must be one of the decoder's {layers} blocks, got {run.loss.alignment_layer}."
        )


@torch.no_grad()
def diffusion_tokenizer_scores(
    tokenizer: DiffusionTokenizer,
    decode: Callable[[Float[Tensor, "b n d"], Sequence[int]], Images],
    views: EvaluationImages,
    *,
    limit: int,
    quantize: bool = True,
) -> dict[str, float]:
    """What a tokenizer and its decoder do on `limit` images, evenly spread over all; for a log line.

    Every image is decoded twice under the same noise: from its own codes (`psnr`, dB), and from those of the image half
    the set away (`psnr_shuffled`), which is of another class where the set is sorted. Their `gap` is what the right
    codes are worth: near 0 where the decoder ignores them, however low the flow loss is, and for a single image.
    `decode` turns codes, and the numbers of the images, which decide about their noise, into images in [-1, 1].

    Without `quantize` the latents take the place of codes, as in training before there is a codebook; there is no
    usage then, and no perplexity by group.
    """
    chosen = spread(len(views), limit)
    batches = [chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH)]
    codes, own, shuffled = [], [], []
    counts = torch.zeros(tokenizer.config["num_groups"], tokenizer.config["codebook_size"])
    for numbers in batches:
        images = views.batch(numbers)["image"].to(tokenizer.device)
        vectors, token_ids = latents_or_codes(tokenizer, images, quantize=quantize)
        codes.append(vectors)
        if token_ids is not None:
            groups = token_ids.split(tokenizer.tokens_per_group, dim=1)
            counts += code_counts(list(groups), tokenizer.config["codebook_size"]).cpu()
    codes = torch.cat(codes)
    others = codes.roll(len(chosen) // 2, dims=0)
    for numbers, right, wrong in zip(batches, codes.split(_BATCH), others.split(_BATCH), strict=True):
        images = views.batch(numbers)["image"].to(tokenizer.device)
        own.append(psnr(decode(right, numbers), images))
        shuffled.append(psnr(decode(wrong, numbers), images))
    values = {"psnr": float(torch.cat(own).mean()), "psnr_shuffled": float(torch.cat(shuffled).mean())}
    values |= {"gap": values["psnr"] - values["psnr_shuffled"]}
    if counts.any():
        values["usage"] = float((counts.sum(dim=0) > 0).float().mean())
        values |= {f"perplexity_group{k}": value for k, value in enumerate(perplexity(counts).tolist())}
    return {f"val/{name}": value for name, value in values.items()}


def latents_or_codes(
    tokenizer: DiffusionTokenizer, images: Images, *, quantize: bool
) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n"] | None]:
    """What the causal stack reads, and the token ids behind it where there are any."""
    if not quantize or tokenizer.codebook is None:
        return tokenizer.latents(images), None
    encoded = tokenizer.encode(images)
    return encoded.quantized, encoded.token_ids


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
        loss, device = run.loss, accelerator.device
        self._distance = self._teacher = None
        if loss.perceptual:
            taps = {"taps": loss.perceptual_taps} if loss.perceptual_network == "lite0" else {}
            distance = perceptual_distance(loss.perceptual_network, lpips_weights=loss.lpips_weights, **taps)
            self._distance = distance.to(device)
        if loss.alignment:
            self._teacher = frozen_features(loss).to(device)

    @staticmethod
    def describe(run: DiffusionTokenizerRun) -> str:
        """Settings, size, cost and memory of a run, without heads and frozen networks. No weight is allocated."""
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

    def draw(self, parts: Sequence[Batch]) -> Sequence[tuple[Float[Tensor, "b k"], Float[Tensor, ""]]]:
        """Raw times of each part, and the tokens that the codebook errors count: their mean over parts and processes.

        So the codebook losses of all parts together are those of the whole batch.
        """
        loss, scheduler, raw_t = self.run.loss, self._scheduler, []
        settings = {"num_groups": self.num_levels, "latest": loss.latest_time, "seed": self.run.seed}
        for part in parts:
            times = raw_times(part["position"], loss.noise_levels, kind=loss.times, **settings)
            raw_t.append(times.to(self._accelerator.device))
        ends = torch.cat([scheduler.window_of(times.flatten()) for times in raw_t]) + scheduler.tokens_per_step
        counted = cast(Tensor, self._accelerator.reduce(ends.sum().float() / len(raw_t), "mean"))
        return [(times, counted) for times in raw_t]

    def losses(
        self, model: nn.Module, batch: Batch, drawn: tuple[Tensor, Tensor], *, step: int, quantize: bool
    ) -> TokenizerLosses:
        """Losses of one part of a batch."""
        run, device, size, (raw_t, counted_tokens) = self.run, self._accelerator.device, self.image_size, drawn
        images = batch["image"].to(device)
        noise = training_noise(batch["position"], run.loss.noise_levels, (size, size), seed=run.seed, device=device)
        output = model(images, raw_t, noise, quantize=quantize)
        named = diffusion_losses(
            output,
            images,
            run.loss,
            data_std=self._scheduler.config["data_std"],
            counted_tokens=counted_tokens,
            distance=self._distance,
            teacher=self._teacher,
        )
        ids, length = output.encoded.token_ids, self.tokenizer.tokens_per_group
        groups = [] if ids is None else list(ids.split(length, dim=1))
        return TokenizerLosses(named=named, token_ids=groups, latents=output.encoded.latents)

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

        def decode(vectors: Float[Tensor, "b n d"], numbers: Sequence[int]) -> Images:
            *_, last = decode_steps(model, vectors, numbers)
            return last.clamp(-1, 1)

        limit, threshold = self.run.validation_images, self.run.gap_warning
        values = diffusion_tokenizer_scores(model.image_tokenizer, decode, views, limit=limit, quantize=quantize)
        if values["val/gap"] < threshold:
            logger.warning(
                "an image's own codes decode %.2f dB better than another image's (threshold %.2f dB): the decoder "
                "hardly listens to the codes, whatever the flow loss says. Try more steps, --loss.jump, "
                "--loss.readout, more --loss.noise-levels or --loss.times balanced.",
                values["val/gap"],
                threshold,
            )
        return values

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
        parts = {"scheduler": model.scheduler, "decoder": model.decoder, TOKENIZER_FOLDER: model.image_tokenizer}
        return export_tokenizer(self._accelerator, self.run, source, parts)
