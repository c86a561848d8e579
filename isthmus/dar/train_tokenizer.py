"""Train a diffusion tokenizer and its pixel decoder on images (`isthmus train tokenizer --preset dar-small-32`)."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from jaxtyping import Bool, Float, Int
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
from isthmus.data.views import Sample
from isthmus.errors import UserError
from isthmus.files import alone_in
from isthmus.nn.draws import REVIVE, stream
from isthmus.nn.perceptual import perceptual_distance, psnr
from isthmus.nn.quantization import k_means
from isthmus.nn.saved_model import without_values
from isthmus.nn.shapes import Images
from isthmus.pictures import save_picture, spread, table, to_pil
from isthmus.pipelines.folder import model_folder
from isthmus.training.checkpoints import Progress, resume, save_checkpoint, written_or_explained
from isthmus.training.codebook import CodebookUsage, code_counts
from isthmus.training.config import LAST_REVIVAL
from isthmus.training.cost import num_parameters, report, training_cost
from isthmus.training.images import first_images, image_batches, open_splits, stream_states
from isthmus.training.optim import ExponentialMovingAverage, adamw, set_rates
from isthmus.training.run import (
    FiniteGuard,
    Log,
    StepMeans,
    StopRequest,
    clip_gradients,
    close_trackers,
    display,
    start_run,
    write_record,
)
from isthmus.training.saved_networks import TOKENIZER_FOLDER, averaged_model, refuse_contradictions, tokenizer_record


def codebook_weight(model: DiffusionTokenizer) -> Tensor:
    """The raw codes. Raises `UserError` for a tokenizer without a codebook."""
    if model.codebook is None:
        raise UserError("this tokenizer keeps its tokens continuous (model.quantized False): it has no codes.")
    return model.codebook.weight


@torch.no_grad()
def initialize_unit_codebook(model: DiffusionTokenizer, images: Images, *, seed: int) -> None:
    """Start the codebook from the encoder's outputs on `images`: k-means, brought back to unit length."""
    weight = codebook_weight(model)
    was_training = model.training
    # running statistics, and none are changed
    model.eval()
    latents = torch.cat([model.latents(part).flatten(0, 1) for part in images.split(64)])
    model.train(was_training)
    weight.copy_(F.normalize(k_means(latents, len(weight), seed=seed), dim=-1))


@torch.no_grad()
def revive_unit_codes(
    model: DiffusionTokenizer, dead: Bool[Tensor, " k"], latents: Float[Tensor, "b n d"], *, seed: int, step: int
) -> int:
    """Move codes that no group uses onto latents of the present batch; returns how many moved."""
    count = int(dead.sum())
    if count:
        rows = latents.flatten(0, 1)
        # without replacement: two codes on one latent would stay together
        order = torch.from_numpy(stream(seed, REVIVE, step).permutation(len(rows))).to(rows.device)
        chosen = order[torch.arange(count, device=rows.device) % len(rows)]
        weight = codebook_weight(model)
        weight[dead] = rows[chosen].to(weight)
    return count


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


def averaged_parts(model: TokenizerWithDecoder, ema: ExponentialMovingAverage) -> TokenizerParts:
    """Copies of tokenizer and decoder that hold the averages; the heads stay behind."""
    return TokenizerParts(
        averaged_model(model.image_tokenizer, ema, prefix="image_tokenizer."),
        averaged_model(model.decoder, ema, prefix="decoder."),
        model.scheduler,
    )


def export_parts(
    accelerator: Accelerator, parts: TokenizerParts, run: DiffusionTokenizerRun, source: ImageSource | ImageStream
) -> Path:
    """Write tokenizer, decoder and scheduler into the run's folder, the tokenizer last: with it all are there.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    if accelerator.is_main_process:
        partial = run.out / "export.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with written_or_explained(run.out / TOKENIZER_FOLDER, partial):
            parts.scheduler.save_pretrained(partial / SCHEDULER_FOLDER)
            parts.decoder.save_pretrained(partial / DECODER_FOLDER)
            parts.image_tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
            record = json.dumps(tokenizer_record(source), indent=2) + "\n"
            (partial / TOKENIZER_FOLDER / "training.json").write_text(record, encoding="utf-8")
        for name in (SCHEDULER_FOLDER, DECODER_FOLDER, TOKENIZER_FOLDER):
            shutil.rmtree(run.out / name, ignore_errors=True)
            (partial / name).rename(run.out / name)
        partial.rmdir()
        logger.info("tokenizer and decoder written to %s", run.out)
    accelerator.wait_for_everyone()
    return run.out


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


def describe_diffusion_tokenizer_run(run: DiffusionTokenizerRun) -> str:
    """What the run would be: its settings as JSON, then size, cost and memory. No weight is allocated.

    Heads and frozen networks of optional losses are left out.
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
        f"{config['num_tokens']} tokens in {config['num_groups']} groups, {config['codebook_size']} codes; images of "
        f"{side} px, {levels} noise level{'s' if levels > 1 else ''} each; tokenizer {tokenizer}, decoder {decoder}"
    )
    return report(run, about, training_cost(network, forward))


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
    tokenizer = DiffusionTokenizer(**named(run.model))
    arguments = decoder_arguments(run.decoder, tokenizer)
    decoder = FlowDecoder(condition_width=tokenizer.config["condition_width"], **arguments)
    return TokenizerParts(tokenizer, decoder, scheduler_for(tokenizer, named(run.flow)))


def saved_parts(run: DiffusionTokenizerRun) -> TokenizerParts:
    """The networks of `from_model`; what the run says of the diffusion takes the place of what is saved."""
    parts = load_parts(run.from_model)
    refuse_contradictions(parts.image_tokenizer, named(run.model), run.from_model)
    wanted = decoder_arguments(run.decoder, parts.image_tokenizer, parts.decoder)
    refuse_contradictions(parts.decoder, wanted, run.from_model, options="decoder")
    saved = {name: parts.scheduler.config[name] for name in ("num_inference_steps", "time_shift", "data_std", "solver")}
    return TokenizerParts(
        parts.image_tokenizer, parts.decoder, scheduler_for(parts.image_tokenizer, saved | named(run.flow))
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
    arguments, image_size = named(settings), tokenizer.config["image_size"]
    if "canvas" in arguments:
        arguments["canvas_tokens"] = tokenizer.config["num_tokens"] if arguments.pop("canvas") else None
    if "position_table" in arguments:
        patch = saved.config["patch_size"] if saved else arguments.get("patch_size", _DECODER_PATCH)
        arguments["position_table"] = image_size // patch if arguments["position_table"] else None
    return arguments


def named(settings: object) -> dict[str, Any]:
    """The fields of a dataclass that say something."""
    return {name: value for name, value in asdict(settings).items() if value is not None}  # pyright: ignore


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


def group_counts(tokenizer: DiffusionTokenizer, token_ids: Tensor) -> Float[Tensor, "groups k"]:
    """How often each code was chosen in each group of tokens."""
    return code_counts(list(token_ids.split(tokenizer.tokens_per_group, dim=1)), tokenizer.config["codebook_size"])


def group_usage(tokenizer: DiffusionTokenizer, *, decay: float = 0.99) -> CodebookUsage:
    """Moving averages of those counts, one row per group."""
    return CodebookUsage(
        tokenizer.config["num_groups"], tokenizer.config["codebook_size"], decay=decay, device=tokenizer.device
    )


def _usage(tokenizer: DiffusionTokenizer, token_ids: Sequence[Tensor]) -> tuple[float, list[float]]:
    counts = group_counts(tokenizer, torch.cat(list(token_ids)))
    usage = group_usage(tokenizer, decay=0.0)
    usage.update(counts)
    return float((counts.sum(dim=0) > 0).float().mean()), usage.perplexity().tolist()


PREVIEW_SEED = 0


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


@torch.no_grad()
def save_decodes(
    parts: TokenizerParts,
    views: EvaluationImages,
    folder: Path,
    step: int,
    *,
    quantize: bool = True,
    num_images: int = 8,
) -> Path:
    """Rows = held-out images; columns = where each solver step would jump to, the result, the image itself."""
    numbers = spread(len(views), num_images)
    images = torch.stack([torch.as_tensor(views[i]["image"]) for i in numbers]).to(parts.decoder.device)
    quantized, _ = latents_or_codes(parts.image_tokenizer, images, quantize=quantize)
    steps = [to_pil(preview) for preview in decode_steps(parts, quantized, numbers)]
    names = [f"step {k}" for k in range(1, len(steps))] + ["decoded", "image"]
    rows = list(zip(*steps, to_pil(images), strict=True))
    return save_picture(table(rows, column_names=names), folder / f"reconstructions-{step:08d}.png")


# images the codebook starts from
_CODEBOOK_IMAGES = 512
_CODEBOOK = "image_tokenizer.codebook.weight"


@alone_in("run.out")
def train_diffusion_tokenizer(run: DiffusionTokenizerRun) -> Path:
    """Train until `num_steps`, continuing where an earlier call stopped; returns the run's folder.

    Raises:
        UserError: data, folder and model do not fit each other (before anything is trained), or a loss is not finite.
        KeyboardInterrupt: Ctrl-C, after a last checkpoint.
    """
    accelerator = start_run(run, find_unused_parameters=True)
    bare = build_networks(run).to(accelerator.device)
    tokenizer, scheduler = bare.image_tokenizer, bare.scheduler
    image_size = tokenizer.config["image_size"]
    train, held_out = open_splits(run, image_size)
    write_record(accelerator, run, data_fingerprint=train.fingerprint)

    model, optimizer = accelerator.prepare(bare, adamw(bare, run.optim))
    distance, teacher = frozen_networks(run, accelerator.device)
    ema = ExponentialMovingAverage(bare, run.ema_decay)
    usage = group_usage(tokenizer)
    progress, log = Progress(num_steps=run.num_steps), Log(accelerator, run.out / "log.jsonl")
    if (extras := resume(accelerator, ema, progress, run.out)) is not None:
        usage.load_state_dict(extras)
    log.rewind(progress.step)
    batches = image_batches(
        run,
        train,
        image_size=image_size,
        step=progress.step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        stream_states=progress.stream_states,
    )
    guard, bar = FiniteGuard(accelerator.device), display(accelerator, run, progress, "tokenizer")
    model.train()
    if run.freeze_encoder and tokenizer.latent_batch_norm is not None:
        # its running statistics are no parameters, and they decide about token ids as weights do
        tokenizer.latent_batch_norm.eval()

    with StopRequest() as stop, bar:
        while progress.step < run.num_steps and not stop.agreed(accelerator):
            rate = set_rates(optimizer, progress.step, run.optim, run.num_steps)
            warm = bool(run.from_model) or progress.step >= run.continuous_steps
            quantize = warm and tokenizer.codebook is not None
            if quantize and not run.from_model and progress.step == run.continuous_steps > 0:
                start_codebook(run, tokenizer, train, ema)

            parts = list(islice(batches, run.accumulate))
            raw_t = [draw_times(run, scheduler, part["position"]).to(accelerator.device) for part in parts]
            counted = mean_counted_tokens(accelerator, scheduler, raw_t)
            counts, means = torch.zeros_like(usage.hits()), StepMeans()
            for part, times in zip(parts, raw_t, strict=True):
                images = part["image"].to(accelerator.device)
                noise = training_noise(
                    part["position"],
                    run.loss.noise_levels,
                    (image_size, image_size),
                    seed=run.seed,
                    device=accelerator.device,
                )
                with accelerator.accumulate(model):
                    output = model(images, times, noise, quantize=quantize)
                    losses = diffusion_losses(
                        output,
                        images,
                        run.loss,
                        data_std=scheduler.config["data_std"],
                        counted_tokens=counted,
                        distance=distance,
                        teacher=teacher,
                    )
                    total = torch.stack([losses[name] for name in losses if name.startswith("weighted/")]).sum()
                    accelerator.backward(total)
                    if accelerator.sync_gradients:
                        grad_norm = clip_gradients(accelerator, model, run.optim.max_grad_norm)
                        guard.watch(grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if output.token_ids is not None:
                    counts += group_counts(tokenizer, output.token_ids)
                guard.watch(total)
                means.add(losses | {"loss": total})

            progress.step += 1
            progress.images += run.batch_size
            ema.update(bare)
            if quantize:
                usage.update(cast(Tensor, accelerator.reduce(counts, "sum")))
                if run.revive_every and not run.freeze_encoder and progress.step % run.revive_every == 0:
                    latents = cast(Tensor, accelerator.gather(output.latents.detach()))
                    revive(run, tokenizer, usage, latents, ema, progress)
            bar.update()

            if progress.due(run.log_every):
                guard.check(run, progress.step)
                values = step_values(means.over_processes(accelerator), usage if quantize else None)
                log.write(progress, values | {"train/learning_rate": rate, "train/grad_norm": grad_norm.item()})
                bar.measured({"loss": f"{values['train/loss']:.3f}"}, images=progress.images)
            if (progress.due(run.validate_every) or progress.due(run.preview_every)) and accelerator.is_main_process:
                averaged, views = averaged_parts(bare, ema), EvaluationImages(held_out, image_size)
                if progress.due(run.validate_every):
                    scores = measure(run, averaged, views, quantize)
                    log.write(progress, scores.as_floats())
                    warn_of_collapse(run, scores, quantize)
                if progress.due(run.preview_every):
                    save_decodes(averaged, views, run.out / "previews", progress.step, quantize=quantize)
            if progress.due(run.save_every):
                guard.check(run, progress.step, ema.averages.values())
                progress.stream_states = stream_states(batches)
                save_checkpoint(
                    accelerator, ema, progress, run.out, keep=run.keep_checkpoints, extras=usage.state_dict()
                )

        if progress.step < run.num_steps:
            guard.check(run, progress.step, ema.averages.values())
            progress.stream_states = stream_states(batches)
            save_checkpoint(accelerator, ema, progress, run.out, keep=run.keep_checkpoints, extras=usage.state_dict())
            raise KeyboardInterrupt
    folder = export_parts(accelerator, averaged_parts(bare, ema), run, train)
    close_trackers(accelerator)
    return folder


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


def draw_times(run: DiffusionTokenizerRun, scheduler: FlowMatchingScheduler, positions: Tensor) -> Tensor:
    """Raw times (b, k) of training positions."""
    return raw_times(
        positions,
        run.loss.noise_levels,
        kind=run.loss.times,
        num_groups=scheduler.config["num_groups"],
        latest=run.loss.latest_time,
        seed=run.seed,
    )


def mean_counted_tokens(
    accelerator: Accelerator, scheduler: FlowMatchingScheduler, raw_t: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """Tokens that the codebook errors count, mean over the parts of the batch and all processes."""
    ends = torch.cat([scheduler.window_of(times.flatten()) for times in raw_t]) + scheduler.tokens_per_step
    return cast(Tensor, accelerator.reduce(ends.sum().float() / len(raw_t), "mean"))


def start_codebook(
    run: DiffusionTokenizerRun,
    tokenizer: DiffusionTokenizer,
    source: ImageSource | ImageStream,
    ema: ExponentialMovingAverage,
) -> None:
    """K-means start of the codebook, the same in every process."""
    images = first_images(run, source, image_size=tokenizer.config["image_size"], count=_CODEBOOK_IMAGES)
    initialize_unit_codebook(tokenizer, images.to(tokenizer.device), seed=run.seed)
    weight = codebook_weight(tokenizer)
    # sums on a GPU may differ between processes, and nothing later would bring the copies together again
    broadcast(weight.data)
    ema.restart(_CODEBOOK, weight)


def revive(
    run: DiffusionTokenizerRun,
    tokenizer: DiffusionTokenizer,
    usage: CodebookUsage,
    latents: Tensor,
    ema: ExponentialMovingAverage,
    progress: Progress,
) -> None:
    """Move dead codes onto latents of the whole batch (its last part), in every process alike."""
    if progress.step > LAST_REVIVAL * run.num_steps:
        return
    dead = ~usage.used().any(dim=0)
    moved = revive_unit_codes(tokenizer, dead, latents, seed=run.seed, step=progress.step)
    if moved:
        weight = codebook_weight(tokenizer)
        broadcast(weight.data)
        ema.restart(_CODEBOOK, weight, rows=dead)
        logger.info("step %d: revived %d of %d codes", progress.step, moved, len(dead))


def step_values(means: dict[str, Tensor], usage: CodebookUsage | None) -> dict[str, float]:
    """What one log line of training says of losses and codes; `usage` None while there is no quantisation."""
    values = {f"train/{name}": value.item() for name, value in means.items()}
    if usage is not None:
        values["train/usage"] = float(usage.used().any(dim=0).float().mean())
        values |= {f"train/perplexity_group{k}": float(v) for k, v in enumerate(usage.perplexity())}
    return values


def measure(
    run: DiffusionTokenizerRun, parts: TokenizerParts, views: EvaluationImages, quantize: bool
) -> DiffusionTokenizerScores:
    """Scores on held-out images, decoded with the solver that the saved model will have."""
    return diffusion_tokenizer_scores(
        parts.image_tokenizer, decoding(parts), views, limit=run.validation_images, quantize=quantize
    )


def warn_of_collapse(run: DiffusionTokenizerRun, scores: DiffusionTokenizerScores, quantize: bool) -> None:
    """Say in words when the decoder does not listen to the codes, or held-out images use too few of them."""
    if scores.gap < run.gap_warning:
        logger.warning(
            "an image's own codes decode %.2f dB better than another image's (threshold %.2f dB): the decoder hardly "
            "listens to the codes, whatever the flow loss says. Try more steps, --loss.jump, --loss.readout, more "
            "--loss.noise-levels or --loss.times balanced.",
            scores.gap,
            run.gap_warning,
        )
    if quantize and scores.usage < run.usage_warning:
        logger.warning(
            "held-out images use %.0f %% of the codes (threshold %.0f %%): the codebook is collapsing. Try more "
            "--continuous-steps, a smaller --revive-every or a smaller --model.codebook-size.",
            100 * scores.usage,
            100 * run.usage_warning,
        )
