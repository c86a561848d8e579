"""Training a next-scale prior (VAR, SRDD): cross-entropy of every token, weighted over scales."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from isthmus.data.huggingface import ImageStream
from isthmus.data.source import ImageSource
from isthmus.data.token_cache import TokenCache
from isthmus.data.views import Batch
from isthmus.errors import UserError
from isthmus.next_scale.pipeline import NextScalePipeline
from isthmus.next_scale.prompts import check_widths
from isthmus.next_scale.pyramid import ScaleSchedule
from isthmus.next_scale.refinement import refined_scales
from isthmus.next_scale.runs import PriorRun
from isthmus.next_scale.sampling import AskedTexts, ScaleSampler
from isthmus.next_scale.tokenizer import EncoderOutput, MultiScaleVQVAE
from isthmus.next_scale.train_tokenizer import load_tokenizer
from isthmus.next_scale.transformer import NextScaleTransformer, NextScaleTransformerOutput
from isthmus.nn.draws import DROP_PATH, HIDDEN_TOKENS, SCALE_SUBSET, stream
from isthmus.nn.guidance import at_sides, guidance_at
from isthmus.nn.saved_model import Config, without_values
from isthmus.nn.shapes import Images, TokenPyramid
from isthmus.nn.stored_llama import fingerprint
from isthmus.pictures import to_pil
from isthmus.pipelines.labels import names_in_order
from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.pretrained import PretrainedTextEncoder
from isthmus.training.arguments import given
from isthmus.training.captions import (
    Captions,
    FrozenFeatures,
    TextEncoder,
    check_captions,
    encoder_of,
    shown_captions,
    warn_of_cut_captions,
    with_words,
)
from isthmus.training.config import TextConfig, TokensRun
from isthmus.training.cost import Cost, num_parameters, report, training_cost
from isthmus.training.images import dropped_labels, open_split, open_splits
from isthmus.training.optim import ExponentialMovingAverage
from isthmus.training.previews import save_samples
from isthmus.training.saved_networks import (
    averaged_model,
    export_pipeline,
    kept_classes,
    load_model,
    refuse_contradictions,
    sampling_options,
)
from isthmus.training.train_prior import PriorTask, bits_by_level


def scale_weights(kind: Literal["token-uniform", "lognormal"], scale_sizes: Sequence[int]) -> tuple[float, ...]:
    """Weight of the mean loss of each scale; they add up to 1.

    token-uniform: every token counts the same, so scale k weighs s_k^2 / L and the last scale most (VAR).
    lognormal: a normal density over the standardised sides in reverse order (spec of SRDD, 6): most weight on the
    middle scales.

    >>> [round(w, 3) for w in scale_weights("token-uniform", (1, 2, 4))]
    [0.048, 0.19, 0.762]
    """
    sizes = np.array(scale_sizes, dtype=np.float64)
    if kind == "token-uniform" or len(sizes) == 1:
        weights = sizes**2
    else:
        relative = sizes / sizes[-1]
        standardised = (relative[::-1] - relative.mean()) / relative.std(ddof=1)
        weights = np.exp(-(standardised**2) / 2)
    return tuple(float(w) for w in weights / weights.sum())


@dataclass
class NextScaleLosses:
    """What one batch gave."""

    total: Float[Tensor, ""]
    """What is minimised."""
    by_scale: Float[Tensor, " scales"]
    """Mean cross-entropy of each scale that was run, nats per token."""
    logits: Float[Tensor, "b l v"]
    token_ids: Int[Tensor, "b l"]
    counted: Bool[Tensor, "b l"] | None = None
    """Tokens that the loss is on; None where it is on all."""

    def logged(self) -> dict[str, Tensor]:
        """Loss, token accuracy, and nats per token of every scale run."""
        hits = self.logits.argmax(dim=-1) == self.token_ids
        hits = hits if self.counted is None else hits[self.counted]
        return {"loss": self.total.detach(), "token_accuracy": hits.float().mean(), "nats": self.by_scale}


def next_scale_loss(
    logits: Float[Tensor, "b l v"],
    token_ids: Int[Tensor, "b l"],
    schedule: ScaleSchedule,
    weights: Sequence[float],
    *,
    scales: Sequence[int],
    label_smoothing: float = 0.0,
    counted: Bool[Tensor, "b l"] | None = None,
) -> NextScaleLosses:
    """Weighted cross-entropy over `scales`; `logits` and `token_ids` hold their tokens only.

    With a random subset of the scales the sum is scaled by all / run, so that its mean over subsets is the full loss.
    Where only some tokens are `counted` (at least one per image and scale), a scale's loss is their mean per image.
    """
    # rows of logits, as they lie: a class axis in the middle would be laid out anew, twice as slow on a CPU
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), token_ids.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(token_ids)
    lengths = [schedule.lengths[k] for k in scales]
    if counted is not None:
        parts = zip(losses.split(lengths, dim=1), counted.split(lengths, dim=1), strict=True)
        by_scale = torch.stack([((part * own).sum(dim=1) / own.sum(dim=1)).mean() for part, own in parts])
    else:
        by_scale = torch.stack([part.mean() for part in losses.split(lengths, dim=1)])
    chosen = by_scale.new_tensor([weights[k] for k in scales])
    total = (chosen * by_scale).sum() * (schedule.num_scales / len(scales))
    return NextScaleLosses(total, by_scale.detach(), logits.detach(), token_ids, counted)


def path_factors(
    positions: Int[Tensor, " b"], rates: Sequence[float], *, seed: int
) -> Float[Tensor, "b layers 2"] | None:
    """Stochastic depth: 0 or 1 / (1 - rate) per image, block and branch, decided per training position."""
    if not any(rates):
        return None
    rate = np.array(rates)[:, None]
    rows = [
        (stream(seed, DROP_PATH, int(position)).random((len(rates), 2)) >= rate) / (1 - rate) for position in positions
    ]
    return torch.from_numpy(np.stack(rows)).float()


def scale_subset(num_scales: int, count: int | None, *, seed: int, step: int) -> tuple[int, ...]:
    """Which scales this step runs: all, or `count` drawn without replacement, the same in every process."""
    if count is None or count >= num_scales:
        return tuple(range(num_scales))
    return tuple(sorted(int(k) for k in stream(seed, SCALE_SUBSET, step).permutation(num_scales)[:count]))


def select_scales(rows: Tensor, schedule: ScaleSchedule, scales: Sequence[int], *, first: int = 0) -> Tensor:
    """Columns of `scales` out of a (b, tokens of scales `first`.., ...) tensor."""
    if len(scales) == schedule.num_scales:
        return rows
    parts = rows.split(list(schedule.lengths[first:]), dim=1)
    return torch.cat([parts[k - first] for k in scales if k >= first] or [rows[:, :0]], dim=1)


@dataclass
class PartlyShown:
    """What the inputs of a batch show of their own tokens."""

    counted: Bool[Tensor, "b l"]
    """True where a token is predicted: hidden, or of a scale that shows none of its own."""
    marked: Bool[Tensor, "b l"]
    """True where a token is hidden beside others that are shown."""
    shows: Bool[Tensor, "b scales"]
    """True where a scale shows tokens of its own."""


def partly_shown(
    positions: Int[Tensor, " b"], lengths: Sequence[int], *, probability: float, seed: int, one_scale: bool = False
) -> PartlyShown:
    """Which scales show tokens of their own, each with `probability`, and which of these stay hidden.

    It is what a masked round of `ScaleRefinementScheduler` asks of a model (spec of SRDD, 3.2, masked resampling). The
    share that is hidden is uniform in (0, 1], at least one token. The first scale shows nothing. Decided per training
    position and scale, by (seed, position, scale).

    `one_scale` is for causal models: with `probability` an image shows tokens at one of its scales, each as likely.
    Where several did, a scale would be trained on the keys of many partial inputs, of which a draw holds none: it
    restores the ordinary keys after the rounds of a scale. Those of the one scale are still read by the later scales
    of that image, so these learn on them at times; they hold nothing that the features do not.
    """
    marked, shows = [], []
    for position in positions.tolist():
        rows, flags, chosen = [np.zeros(lengths[0], dtype=bool)], [False], None
        random = stream(seed, HIDDEN_TOKENS, position)
        if one_scale and len(lengths) > 1 and random.random() < probability:
            chosen = int(random.integers(1, len(lengths)))
        for scale, length in enumerate(lengths[1:], start=1):
            random = stream(seed, HIDDEN_TOKENS, position, scale)
            coin = random.random()
            shown = scale == chosen if one_scale else coin < probability
            count = math.ceil((1 - random.random()) * length)
            hidden = np.zeros(length, dtype=bool)
            hidden[random.permutation(length)[:count]] = True
            rows.append(hidden & shown)
            flags.append(shown)
        marked.append(np.concatenate(rows))
        shows.append(flags)
    marks, flags = torch.from_numpy(np.stack(marked)), torch.tensor(shows)
    return PartlyShown(marks | ~flags.repeat_interleave(torch.tensor(lengths), dim=1), marks, flags)


@torch.no_grad()
def partial_inputs(
    tokenizer: MultiScaleVQVAE, token_ids: TokenPyramid, drawn: PartlyShown, schedule: ScaleSchedule
) -> Float[Tensor, "b l d"]:
    """Teacher-forced inputs of scales 1..K-1, (b, L - s_0^2, d); those of scales that show tokens hold these too."""
    ordinary = tokenizer.scale_inputs(token_ids, schedule).split(list(schedule.lengths[1:]), dim=1)
    hidden = drawn.marked.to(token_ids[0].device).split(list(schedule.lengths), dim=1)
    shows = drawn.shows.to(token_ids[0].device)
    features = torch.zeros(
        len(shows), tokenizer.codebook.embedding_dim, schedule.grid, schedule.grid, device=shows.device
    )
    parts = [torch.zeros(len(shows), 0, tokenizer.codebook.embedding_dim, device=shows.device)]
    for scale, ids in enumerate(token_ids):
        codes = tokenizer.lookup(ids)
        if scale:
            # hidden first, then upsampled and through phi: no hidden token reaches an input
            partial = tokenizer.partial_scale_input(features, codes, hidden[scale], scale, schedule)
            parts.append(torch.where(shows[:, scale, None, None], partial, ordinary[scale - 1]))
        features = tokenizer.add_codes(features, codes, scale, schedule)
    return torch.cat(parts, dim=1)


class ScheduleEncoder(nn.Module):
    """Images to the tokens of one or several schedules, one behind the other.

    `config` names the schedules, so that a cache made under others is told apart by its fingerprint.
    """

    def __init__(self, tokenizer: MultiScaleVQVAE, schedules: Sequence[ScaleSchedule]):
        super().__init__()
        self.tokenizer, self.schedules = tokenizer, tuple(schedules)
        layout = [[list(schedule.sizes), list(schedule.phi_indices)] for schedule in schedules]
        self.config = Config({**tokenizer.config, "schedules": layout})

    def encode(self, images: Images) -> EncoderOutput:
        """`token_ids` holds the scales of the first schedule, then those of the next; the latents are searched once."""
        latents = self.tokenizer.latents(images)
        pyramids = [self.tokenizer.requantize(latents, schedule) for schedule in self.schedules]
        return EncoderOutput([ids for pyramid in pyramids for ids in pyramid], latents)


def encoder_for(tokenizer: MultiScaleVQVAE, *schedules: ScaleSchedule) -> MultiScaleVQVAE | ScheduleEncoder:
    """The tokenizer itself where its own schedule is all that is asked for, so that token caches stay what they are."""
    return tokenizer if schedules == (tokenizer.schedule,) else ScheduleEncoder(tokenizer, schedules)


class NextScaleTask(PriorTask):
    """A base to derive from: the networks, what is measured while training, and what is left behind.

    Args:
        run: settings.
        tokenizer: frozen.
        splits: training and held-out images.
        network: the transformer in training, whose scales are the tokenizer's, or some of them.
        guided_sizes: the sides that a list of guidance values in the run counts on; None is those of the network.
        text_encoder: what reads captions, for a transformer of texts; it is frozen, unless `with_cache` joins it to the
            network.
        caption_dropout: share of the captions that are replaced by the empty one.
    """

    # not whole blocks, since all modulations are computed ahead of them
    sharded = ("BlockModulation", "MultiHeadAttention", "FeedForward")
    level = "scale"
    note = ""
    """What the card says of the training, beside its steps."""

    def __init__(
        self,
        run: TokensRun,
        tokenizer: MultiScaleVQVAE,
        splits: tuple[ImageSource | ImageStream, ImageSource],
        network: NextScaleTransformer,
        *,
        guided_sizes: Sequence[int] | None = None,
        text_encoder: TextEncoder | None = None,
        caption_dropout: float = 0.0,
    ):
        self.run, self.tokenizer, self.transformer = run, tokenizer, network
        self.network: NextScaleTransformer | CaptionedTransformer = network
        self.train, self.held_out = splits
        self.text_encoder, self._caption_dropout = text_encoder, caption_dropout
        self._captions: Captions | None = None
        self._features = FrozenFeatures(text_encoder) if isinstance(text_encoder, PretrainedTextEncoder) else None
        self.image_size = tokenizer.image_size
        # the phi of every side is the tokenizer's, also where the transformer leaves scales out
        self.schedule = tokenizer.schedule.derive(network.schedule.sizes)
        self.encoder = encoder_for(tokenizer, self.schedule)
        guided = self.schedule.sizes if guided_sizes is None else tuple(guided_sizes)
        options = sampling_options(
            run.sampling,
            codebook_size=network.config["codebook_size"],
            # a text, too, is something to guide towards
            num_classes=network.null_class_id or int(network.text_start is not None),
            num_guided_steps=len(guided),
        )
        sizes = self.schedule.sizes
        temperature = at_sides("temperature", options.temperature, guided, sizes)
        guidance = guidance_at(options.guidance_scale, guided, sizes)
        self.options = replace(options, guidance_scale=guidance, temperature=temperature)

    def with_cache(self, cache: TokenCache) -> None:
        """Take over the captions."""
        if self.text_encoder is None:
            return
        assert cache.captions is not None, "the images have some"
        self._captions = Captions(self.train, cache.captions, drop=self._caption_dropout, seed=self.run.seed)
        if self._features is not None:
            self._features.keep_beside(cache, self.train, self.held_out_captions(slice(None)))
        if isinstance(self.text_encoder, SmallTextEncoder):
            warn_of_cut_captions(self.text_encoder.tokenizer, cache.captions)

    def place(self, device: torch.device) -> None:
        """Move the tokenizer to the device of the training, and a frozen text encoder of transformers."""
        self.tokenizer.to(device)
        if self._features is not None:
            self._features.encoder.to(device)

    def averaged(self, ema: ExponentialMovingAverage) -> "NextScaleTransformer | CaptionedTransformer":
        """Copies that hold the averages."""
        if not isinstance(self.network, CaptionedTransformer):
            return averaged_model(self.network, ema)
        return CaptionedTransformer(
            averaged_model(self.network.transformer, ema, prefix="transformer."),
            averaged_model(self.network.text_encoder, ema, prefix="text_encoder."),
        )

    def lengths(self, step: int) -> dict[int, int]:
        """Tokens of every scale."""
        return dict(enumerate(self.schedule.lengths))

    def token_ids(self, images: Tensor) -> Tensor:
        """All tokens (b, L) of images."""
        return torch.cat(self.tokenizer.requantize(self.tokenizer.latents(images), self.schedule), dim=1)

    @torch.no_grad()
    def held_out_bits(self, model: nn.Module, token_ids: Tensor, labels: Tensor) -> dict[str, float]:
        """Bits per token of held-out images, in all and per scale, from their token ids (n, L) and labels (n,)."""
        tokenizer, schedule = self.tokenizer, self.schedule
        lengths = list(schedule.lengths)
        uniform = scale_weights("token-uniform", schedule.sizes)
        sums = torch.zeros(schedule.num_scales, device=token_ids.device)
        for first, ids in zip(range(0, len(token_ids), 32), token_ids.split(32), strict=True):
            inputs = tokenizer.scale_inputs(list(ids.split(lengths, dim=1)), schedule)
            said = self._held_out_words(slice(first, first + len(ids)))
            logits = model(self._known_labels(labels[first : first + len(ids)]), inputs, **said).logits
            loss = next_scale_loss(logits, ids, schedule, uniform, scales=range(schedule.num_scales))
            sums += loss.by_scale * len(ids)
        return bits_by_level("val", "scale", sums / len(token_ids), dict(enumerate(lengths)))

    def _words(self, captions: Sequence[str]) -> dict[str, Any]:
        """What a forward is given of captions: the words, or what a frozen encoder makes of them."""
        if self._features is not None:
            return {"text": self._features(captions)}
        assert isinstance(self.text_encoder, SmallTextEncoder), "the other kind"
        ids, mask = self.text_encoder.word_ids(captions, warn=False)
        if isinstance(self.network, CaptionedTransformer):
            return {"words": ids, "mask": mask}
        # anew for every batch: kept ones would have been rounded with the batch that they came in first
        with torch.no_grad():
            return {"text": self.text_encoder(ids, mask)}

    def _told(self, batch: Batch) -> dict[str, Any]:
        """What a forward is given of the captions of a batch, some of them dropped; nothing where it reads none."""
        if self._captions is None:
            return {}
        return self._words(self._captions.told(batch["index"], batch["position"]))

    def _held_out_words(self, rows: slice) -> dict[str, Any]:
        """The whole captions of these rows of the held-out images that are measured."""
        return {} if self.text_encoder is None else self._words(self.held_out_captions(rows))

    def _known_labels(self, labels: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Labels that the transformer knows: a model of texts alone is told of no class."""
        return labels if self.transformer.null_class_id else torch.zeros_like(labels)

    @torch.no_grad()
    def save_samples(self, model: Any, folder: Path, step: int) -> None:
        """A picture of samples at fixed seeds: a row for each class, or for each of some held-out captions."""
        bare = self.transformer_of(model)
        names, null = self.train.class_names, bare.null_class_id
        classes, texts = torch.arange(null + 1), None
        if self.text_encoder is not None:
            assert self.held_out.captions is not None, "checked at the start"
            shown, names = shown_captions(self.held_out)
            classes, null = self._known_labels(torch.from_numpy(self.held_out.labels[shown])), len(shown)
            said = self._words([*(self.held_out.captions[i] for i in shown), ""])
            texts = said["text"] if "text" in said else model.text_encoder(said["words"], said["mask"])

        def draw(rows: Int[Tensor, " b"], seeds: list[tuple[int, int]]) -> list[Image.Image]:
            labels = classes[rows].to(bare.device)
            asked = None if texts is None else AskedTexts(texts, rows.to(bare.device))
            *_, last = refined_scales(ScaleSampler(self.tokenizer, bare, labels, seeds, self.options, texts=asked))
            return to_pil(self.tokenizer.decode_features(last.features))

        save_samples(draw, names, null, folder, step)

    def _dropouts(self, batch: Batch) -> tuple[Int[Tensor, " b"], Float[Tensor, "b layers 2"] | None]:
        """Labels, some of them dropped, and the factors of stochastic depth, on the device of the training."""
        device, positions, seed = self.tokenizer.device, batch["position"], self.run.seed
        labels, null = self._known_labels(batch["class_label"].to(device)), self.transformer.null_class_id
        labels = dropped_labels(labels, positions, rate=self.run.label_dropout, null_class_id=null, seed=seed)
        keep = path_factors(positions, self.transformer.drop_path_rates, seed=seed)
        return labels, None if keep is None else keep.to(device)

    def export(self, accelerator: Accelerator, model: Any) -> Path:
        """Write the pipeline, with the text encoder of a model of texts."""
        networks: dict[str, object] = {"image_tokenizer": self.tokenizer, "transformer": self.transformer_of(model)}
        prompt = ""
        if self.text_encoder is not None:
            joined = isinstance(model, CaptionedTransformer)
            networks["text_encoder"] = model.text_encoder if joined else self.text_encoder
            prompt = (self.held_out.captions or ("",))[0]
        return export_pipeline(
            accelerator,
            self.run,
            self.train,
            self.options,
            NextScalePipeline,
            class_names=self.train.class_names if self.transformer.null_class_id else (),
            prompt=prompt,
            note=self.note,
            **networks,
        )

    @staticmethod
    def transformer_of(model: Any) -> NextScaleTransformer:
        """The transformer in what was trained."""
        return model.transformer if isinstance(model, CaptionedTransformer) else model


class NextScalePriorTask(NextScaleTask):
    """VAR and SRDD, as the training loop asks for them; the loss is the cross-entropy of every token."""

    def __init__(self, run: PriorRun):
        tokenizer, saved = starting_point(run)
        splits = open_splits(run, tokenizer.image_size)
        encoder = text_encoder_of(run, saved)
        if encoder is not None:
            check_captions(*splits)
        prior = build_prior(run, tokenizer, saved, splits[0].class_names, encoder)
        super().__init__(run, tokenizer, splits, prior, text_encoder=encoder, caption_dropout=run.text.drop)
        self.run: PriorRun = run
        self._weights = scale_weights(run.scale_loss, self.schedule.sizes)
        self._learns_words = encoder is not None and is_planned(encoder, saved)
        if self._features is not None:
            self.facts = {"text_encoder_fingerprint": fingerprint(self._features.encoder)}

    @staticmethod
    def describe(run: PriorRun) -> str:
        """Settings, size, cost and memory of a run. No weight is allocated."""
        with without_values():
            tokenizer, saved = starting_point(run)
        source = open_split(run, tokenizer.image_size, "train")
        with without_values():
            encoder = text_encoder_of(run, saved)
            model = build_prior(run, tokenizer, saved, source.class_names, encoder)
        about = (
            f"{model.config['scale_attention']}, scales {', '.join(map(str, model.schedule.sizes))}, "
            f"{model.schedule.num_tokens} tokens; {len(source)} images, {len(source.class_names) or 'no'} classes"
        )
        if encoder is None:
            return report(run, about, prior_cost(model))
        check_captions(source)
        if isinstance(encoder, PretrainedTextEncoder):
            return report(run, f"{about}; {captions_read(model, source, frozen=encoder)}", prior_cost(model))
        if is_planned(encoder, saved):
            with without_values():
                encoder = with_words(encoder, source.captions or (), run.text.num_words)
        words = 257 + len(encoder.config["merges"])
        reads = f"{captions_read(model, source)}, from an encoder of {words} words"
        return report(run, f"{about}; {reads}, {num_parameters(encoder) / 1e6:.2f}M", prior_cost(model, encoder))

    def with_cache(self, cache: TokenCache) -> None:
        """Take over the captions; an encoder that learns gets its words from them and joins the network."""
        if isinstance(self.text_encoder, SmallTextEncoder):
            assert cache.captions is not None, "the images have some"
            if self._learns_words:
                self.text_encoder = with_words(self.text_encoder, cache.captions, self.run.text.num_words)
            self.network = CaptionedTransformer(self.transformer, self.text_encoder)
        super().with_cache(cache)

    @staticmethod
    def has_unused_parameters(run: PriorRun) -> bool:
        """Whether a step may leave weights without a gradient."""
        # scale 0 has a table of its own, and only the others embed words
        return run.scales_per_step is not None

    def compile(self) -> None:
        """Compile the blocks."""
        if self.run.compile:
            self.transformer.compile_blocks()

    def losses(self, model: nn.Module, batch: Batch, step: int) -> NextScaleLosses:
        """Losses of one part of a batch, on the device of the model."""
        run, schedule = self.run, self.schedule
        scales, positions = self._scales(step), batch["position"]
        token_ids = batch["token_ids"].to(self.tokenizer.device)
        inputs, marked, counted = self._inputs(list(token_ids.split(list(schedule.lengths), dim=1)), positions)
        labels, keep = self._dropouts(batch)
        output = model(
            labels,
            select_scales(inputs, schedule, scales, first=1),
            **self._told(batch),
            scales=scales,
            keep=keep,
            hidden=None if marked is None else select_scales(marked, schedule, scales, first=1),
        )
        return next_scale_loss(
            output.logits,
            select_scales(token_ids, schedule, scales),
            schedule,
            self._weights,
            scales=scales,
            label_smoothing=run.label_smoothing,
            counted=None if counted is None else select_scales(counted, schedule, scales),
        )

    def _inputs(
        self, token_ids: TokenPyramid, positions: Tensor
    ) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b inputs"] | None, Bool[Tensor, "b tokens"] | None]:
        """Inputs of scales 1..K-1, which of these hide their own token, and which of all tokens are predicted."""
        schedule, probability = self.schedule, self.run.refinement_probability
        if self.transformer.mask_embedding is None:
            with torch.no_grad():
                return self.tokenizer.scale_inputs(token_ids, schedule), None, None
        # also where the probability is 0: every weight of the network takes part in every step
        one_scale = not self.transformer.is_markov
        shown = partly_shown(
            positions, schedule.lengths, probability=probability, seed=self.run.seed, one_scale=one_scale
        )
        device, first = token_ids[0].device, schedule.lengths[0]
        inputs = partial_inputs(self.tokenizer, token_ids, shown, schedule)
        return inputs, shown.marked[:, first:].to(device), shown.counted.to(device)

    def lengths(self, step: int) -> dict[int, int]:
        """Tokens of the scales that this step runs."""
        return {k: self.schedule.lengths[k] for k in self._scales(step)}

    def _scales(self, step: int) -> tuple[int, ...]:
        return scale_subset(self.schedule.num_scales, self.run.scales_per_step, seed=self.run.seed, step=step)


class CaptionedTransformer(nn.Module):
    """A transformer and the encoder of its captions, which learn together; `words` and `mask` are `word_ids`."""

    def __init__(self, transformer: NextScaleTransformer, text_encoder: SmallTextEncoder):
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.transformer.enable_gradient_checkpointing()
        self.text_encoder.enable_gradient_checkpointing()

    def forward(
        self,
        class_labels: Int[Tensor, " b"],
        scale_inputs: Float[Tensor, "b inputs d"],
        *,
        words: Int[Tensor, "b words"],
        mask: Bool[Tensor, "b words"],
        **given: Any,
    ) -> NextScaleTransformerOutput:
        """The transformer's `forward`, told what the encoder makes of the words."""
        device = self.transformer.device
        text = self.text_encoder(words.to(device), mask.to(device))
        return self.transformer(class_labels, scale_inputs, text=text, **given)


def captions_read(model: NextScaleTransformer, source: ImageSource, *, frozen: TextEncoder | None = None) -> str:
    """For a dry run: how many captions there are, what blocks know of them, and a frozen encoder that reads them."""
    sees = "the whole" if model.config["text_width"] is None else "the whole and its words"
    reads = f"captions of {len(set(source.captions or ()))} kinds, of which blocks know {sees}"
    if frozen is None:
        return reads
    return f"{reads}, from a frozen encoder of {num_parameters(frozen) / 1e6:.2f}M, which is not counted"


def prior_cost(model: NextScaleTransformer, encoder: SmallTextEncoder | None = None) -> Cost:
    """What an image costs in training a transformer, and with it the encoder of its captions, made without values."""
    num_inputs = model.schedule.num_tokens - model.schedule.lengths[0]
    if encoder is not None:

        def both(network: CaptionedTransformer) -> object:
            words = torch.zeros(1, 1 + network.text_encoder.config["max_length"], dtype=torch.long)
            inputs = torch.zeros(1, num_inputs, model.config["codebook_dim"])
            return network(torch.zeros(1, dtype=torch.long), inputs, words=words, mask=words == 0)

        return training_cost(CaptionedTransformer(model, encoder), both)

    def forward(network: NextScaleTransformer) -> object:
        config = network.config
        text = None
        if config["text_pooled_width"] is not None:
            words = torch.zeros(1, 77, config["text_width"] or 1)  # as many as CLIP reads
            text = TextFeatures(words, torch.ones(1, 77, dtype=torch.bool), torch.zeros(1, config["text_pooled_width"]))
        inputs = torch.zeros(1, num_inputs, config["codebook_dim"])
        return network(torch.zeros(1, dtype=torch.long), inputs, text=text)

    return training_cost(model, forward)


def starting_point(run: PriorRun) -> tuple[MultiScaleVQVAE, NextScalePipeline | None]:
    """The frozen tokenizer of a run, and the saved model that it goes on from; UserError where it names neither."""
    if run.from_model:
        saved = load_model(run.from_model, NextScalePipeline)
        return saved.image_tokenizer, saved
    if run.tokenizer:
        return load_tokenizer(run.tokenizer), None
    raise UserError(
        "a prior needs a tokenizer, got none. Pass --tokenizer FOLDER (of a tokenizer run) or --from MODEL."
    )


def text_encoder_of(run: PriorRun, saved: NextScalePipeline | None) -> TextEncoder | None:
    """What reads the captions of a run; None for a prior of classes. UserError as `encoder_of`."""
    encoder = encoder_of(run.text, None if saved is None else saved.text_encoder, run.from_model)
    if encoder is None and saved is not None and saved.reads_text:
        raise UserError(
            f"{run.from_model} reads texts and was saved without its encoder. Pass --text FOLDER with that encoder."
        )
    if encoder is None and run.text != TextConfig():
        raise UserError(f"{run.from_model} reads no texts, got settings of text. Pass --text small, or leave them out.")
    if encoder is not None and saved is not None and saved.reads_text:
        what = f"the text encoder {run.text.encoder}" if run.text.encoder else "the text encoder"
        check_widths(encoder.text_width, encoder.pooled_width, saved.transformer, what)
    return encoder


def is_planned(encoder: TextEncoder, saved: NextScalePipeline | None) -> bool:
    """Whether it is a new small encoder, which has no words yet."""
    return isinstance(encoder, SmallTextEncoder) and (saved is None or encoder is not saved.text_encoder)


def build_prior(
    run: PriorRun,
    tokenizer: MultiScaleVQVAE,
    saved: NextScalePipeline | None,
    class_names: Sequence[str],
    encoder: TextEncoder | None = None,
) -> NextScaleTransformer:
    """The prior to train on images of these classes, or on what `encoder` makes of their captions: new, or a saved one.

    Captions take the place of classes; a saved prior of classes keeps these beside. UserError where arguments
    contradict the saved one.
    """
    wanted = given(run.model)
    text = {}
    if encoder is not None:
        sees_words = run.text.cross_attention is not False
        text = {"text_pooled_width": encoder.pooled_width, "text_width": encoder.text_width if sees_words else None}
    num_classes, refined = len(class_names), run.refinement_probability > 0
    if saved is not None:
        refuse_contradictions(saved.transformer.config, wanted, run.from_model)
        kept = kept_classes(class_names, names_in_order(saved.class_names))
        source = saved.transformer
        if saved.reads_text and run.text.cross_attention not in (None, source.config["text_width"] is not None):
            raise UserError(
                f"{run.from_model} keeps its network, got text.cross_attention {run.text.cross_attention}. "
                "Leave it out."
            )
        if saved.reads_text and not saved.num_classes:
            num_classes = 0
        same = with_new_classes(source, num_classes, kept=kept, mask_embedding=refined)
        return same if saved.reads_text or not text else with_text(same, **text)
    model = NextScaleTransformer(
        scale_sizes=tokenizer.schedule.sizes,
        codebook_size=tokenizer.config["codebook_size"],
        codebook_dim=tokenizer.config["codebook_dim"],
        num_classes=0 if text else num_classes,
        has_mask_embedding=refined,
        **text,
        **wanted,
    )
    if run.scales_per_step is not None and not model.is_markov:
        raise UserError(
            f"scales_per_step needs the Markov mask, where scales are independent, got {run.scales_per_step} with "
            "causal. Use --model.scale-attention markov."
        )
    return model


def with_new_classes(
    source: NextScaleTransformer,
    num_classes: int,
    *,
    kept: Mapping[int, int] | None = None,
    mask_embedding: bool = False,
) -> NextScaleTransformer:
    """The saved prior with a new class table: rows start at the null row, which is kept; all else is as it was.

    `kept` maps labels to labels of the saved prior whose rows they take over (see `kept_classes`).
    `mask_embedding` adds the mark of hidden tokens where there is none; it starts at zero and changes nothing.
    """
    marked = mask_embedding or source.mask_embedding is not None
    model = NextScaleTransformer(**(source.config | {"num_classes": num_classes, "has_mask_embedding": marked}))
    state = source.state_dict()
    if model.mask_embedding is not None:
        state.setdefault("mask_embedding", torch.zeros_like(model.mask_embedding))
    rows = [(kept or {}).get(label, source.null_class_id) for label in range(num_classes + 1)]
    if source.class_embedding is not None:  # a prior of texts alone has no table
        state["class_embedding.weight"] = state["class_embedding.weight"][rows].clone()
    model.load_state_dict(state)
    return model


def with_text(source: NextScaleTransformer, *, text_pooled_width: int, text_width: int | None) -> NextScaleTransformer:
    """The saved prior of classes, told of texts too, which change nothing at the start: all that adds them is zero."""
    widths = {"text_pooled_width": text_pooled_width, "text_width": text_width}
    model = NextScaleTransformer(**(source.config | widths))
    assert model.text_start is not None and source.class_embedding is not None, "of texts, from classes"
    state = model.state_dict() | source.state_dict()
    for name in ("text_start.weight", "text_start.bias"):
        state[name] = torch.zeros_like(state[name])
    if model.class_embedding is None:  # nothing but the vector of no class: it is what no text says from now on
        state["text_start.bias"] = state.pop("class_embedding.weight")[0].clone()
    if source.config["norm"] == "rms_sandwich" and text_width is not None:
        for number in range(source.config["num_layers"]):
            name = f"blocks.{number}.cross_attention_norm_out.weight"
            state[name] = torch.zeros_like(state[name])
    model.load_state_dict(state)
    return model
