"""Generation of next-scale models: draw all tokens of a scale at once, add them to the features, go on.

Source: Tian et al., "Visual Autoregressive Modeling", section 3.2; spec of VAR, 2.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.next_scale.pyramid import ScaleSchedule, next_scale_input, tokens_to_map
from isthmus.next_scale.tokenizer import MultiScaleVQVAE
from isthmus.next_scale.transformer import Conditioning, NextScaleTransformer
from isthmus.nn.draws import DRAW_STREAMS, TokenStreams, token_gumbels, token_uniforms
from isthmus.nn.sampling import draw_tokens, filter_logits, guided_logits, smooth_weights
from isthmus.nn.shapes import FeatureMap, LatentMap, ScaleTokens, TokenPyramid
from isthmus.pipelines.options import SamplingOptions, guidance_on


def shared_schedule(image_tokenizer: MultiScaleVQVAE, transformer: NextScaleTransformer) -> ScaleSchedule:
    """The scales of the transformer with the phi of the tokenizer: the tokenizer's schedule, or one derived from it.

    Raises:
        UserError: the two do not belong together (codebook size, code width or scales differ).
    """
    for name in ("codebook_size", "codebook_dim"):
        ours, theirs = image_tokenizer.config[name], transformer.config[name]
        if ours != theirs:
            raise UserError(
                f"image tokenizer and transformer must have the same {name}, got {ours} and {theirs}. "
                "Pass the tokenizer that the transformer was trained on."
            )
    sizes, parent = transformer.schedule.sizes, image_tokenizer.schedule
    if sizes == parent.sizes:
        return parent
    if sizes[-1] != parent.grid or not set(sizes) <= set(parent.sizes):
        raise UserError(
            f"the transformer's scale_sizes must be those of the image tokenizer, {parent.sizes}, or some of them "
            f"ending at {parent.grid}, got {sizes}. Pass the tokenizer that the transformer was trained on."
        )
    return parent.derive(sizes)


def null_row_scales(guidance: Sequence[float], *, markov: bool) -> tuple[bool, ...]:
    """Scales at which rows with the null label have to run beside the labelled ones.

    markov: where guidance is on (s != 1). With a cache: at every scale up to the last guided one, whose attention
    reads the keys of all earlier scales.

    >>> null_row_scales((1.0, 2.0, 1.0), markov=True), null_row_scales((1.0, 2.0, 1.0), markov=False)
    ((False, True, False), (True, True, False))
    """
    guided = [s != 1 for s in guidance]
    return tuple(guided) if markov else tuple(any(guided[k:]) for k in range(len(guided)))


@dataclass
class ScaleDraw:
    """Tokens of one scale, drawn and not yet part of the features.

    Attributes:
        token_ids: (b, s * s), row by row.
        codes: (b, d, s, s) in fp32, the codes of these tokens, or with `smooth` mixtures of codes.
        logits: (b, s * s, v), guided and divided by the temperature, not filtered: what the model thinks of every
            code, whatever the filters left to draw from.
    """

    token_ids: ScaleTokens
    codes: FeatureMap
    logits: Float[Tensor, "b l v"]


class ScaleSampler:
    """Predict, draw and add, scale by scale, for loops that may visit a scale again or go back to an earlier one.

    Nothing is remembered between calls but the keys and values of a causal model, which `predict` keeps consistent:
    running a scale forgets it and everything after it first. A loop that changes the tokens of a scale must predict
    the scales after it again, in order.

    Args:
        image_tokenizer: its codebook and phi build the features.
        transformer: predicts the tokens of a scale from the features so far.
        class_labels: (b,), 0..num_classes; num_classes is the null label.
        image_seeds: one (seed, image index) per image. Every random number of an image follows from its own pair.
        options: guidance, filters, temperature. All sampling arithmetic is fp32, whatever the type of the weights.
        streams: which random numbers of an image's pair are read: those of draws, or those of edits.

    Attributes:
        schedule: scales of the transformer, with the phi of the tokenizer.
        options: as given.
        guidance: guidance value of every scale.
        image_seeds: one (seed, image index) per image.
        num_forwards: predictions made so far; labelled and null rows of a scale are one.

    Raises:
        UserError: guidance has another number of values than there are scales, or the two models do not belong
            together. Filters are the caller's to check (`SamplingOptions.check`).
    """

    def __init__(
        self,
        image_tokenizer: MultiScaleVQVAE,
        transformer: NextScaleTransformer,
        class_labels: Int[Tensor, " b"],
        image_seeds: Sequence[tuple[int, int]],
        options: SamplingOptions,
        streams: TokenStreams = DRAW_STREAMS,
    ):
        self.schedule = shared_schedule(image_tokenizer, transformer)
        self.options, self.image_seeds, self.num_forwards = options, list(image_seeds), 0
        self._streams = streams
        self._tokenizer, self._transformer = image_tokenizer, transformer
        self._codebook = image_tokenizer.codebook.weight
        self.guidance = guidance_on(options.guidance_scale, self.schedule.sizes, image_tokenizer.schedule.sizes)
        if bool((class_labels == transformer.null_class_id).all()):
            self.guidance = (1.0,) * self.schedule.num_scales  # nothing to guide away from
        self._with_null = null_row_scales(self.guidance, markov=transformer.is_markov)
        self._batch, doubled = len(class_labels), any(self._with_null)
        with torch.inference_mode():
            # ahead of the loop, in which a GPU need not wait for the CPU; rounds after the first make their own
            self._uniforms = [self._new_uniforms(scale, 0) for scale in range(self.schedule.num_scales)]
            class_labels = class_labels.to(transformer.device)
            self._conditioning = _condition_once(transformer, class_labels, with_null_rows=doubled)
            self._cache = transformer.new_cache(2 * self._batch if doubled else self._batch)

    @torch.inference_mode()
    def start(self) -> LatentMap:
        """Features before scale 0: zeros."""
        shape = (self._batch, self._codebook.shape[1], self.schedule.grid, self.schedule.grid)
        return torch.zeros(shape, device=self._transformer.device, dtype=torch.float32)

    @torch.inference_mode()
    def predict(self, scale: int, features: LatentMap) -> Float[Tensor, "b l v"]:
        """Guided logits of one scale, in fp32, from the features that all earlier scales have built."""
        if scale == 0:
            return self.predict_from(0, self._codebook.new_zeros(self._batch, 0, self._codebook.shape[1]))
        return self.predict_from(scale, next_scale_input(features, self.schedule, scale))

    @torch.inference_mode()
    def predict_from(self, scale: int, inputs: Float[Tensor, "b inputs d"]) -> Float[Tensor, "b l v"]:
        """As `predict`, from inputs of the caller's: (b, s * s, d), or (b, 0, d) at scale 0."""
        self.cut(scale)
        if self._cache is not None and self._cache.length != self.schedule.offsets[scale]:
            raise UserError(
                f"a causal model predicts a scale after all earlier ones, got scale {scale} after "
                f"{self._cache.length} tokens. Predict the scales before it first."
            )
        return self._guided(scale, inputs, None)

    @torch.inference_mode()
    def predict_again(
        self, scale: int, features: LatentMap, codes: FeatureMap, hidden: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b l v"]:
        """Guided logits of a scale that sees its own codes (b, d, s, s), but for the hidden ones; `scale` >= 1.

        A round of masked resampling (spec of SRDD, 3.2). A causal model's keys stay those of the ordinary prediction,
        which has to be the latest one.
        """
        inputs = self._tokenizer.partial_scale_input(features, codes.float(), hidden, scale, self.schedule)
        if self._cache is None:
            return self._guided(scale, inputs, hidden)
        start, end = self.schedule.offsets[scale : scale + 2]
        assert self._cache.length == end, "the scale was predicted just before"
        ordinary = self._cache.copy_of(start, end)
        self.cut(scale)
        logits = self._guided(scale, inputs, hidden)
        self._cache.put_back(start, ordinary)
        return logits

    def _guided(
        self, scale: int, inputs: Float[Tensor, "b inputs d"], hidden: Bool[Tensor, "b l"] | None
    ) -> Float[Tensor, "b l v"]:
        self.num_forwards += 1
        # the null rows lie behind the others in one doubled batch
        copies = 2 if self._with_null[scale] else 1
        inputs = inputs.to(self._transformer.dtype).repeat(copies, 1, 1)
        hidden = None if hidden is None else hidden.repeat(copies, 1)
        conditioning = self._conditioning.leading(copies * self._batch)
        logits = self._transformer.forward_scale(scale, inputs, conditioning, self._cache, hidden=hidden).float()
        if copies == 1:
            return logits
        return guided_logits(logits[: self._batch], logits[self._batch :], self.guidance[scale])

    @torch.inference_mode()
    def draw(self, scale: int, logits: Float[Tensor, "b l v"], *, round_index: int = 0) -> ScaleDraw:
        """Tokens from guided logits, with the random numbers of (seed, image index, scale, round)."""
        options, length = self.options, self.schedule.lengths[scale]
        if options.temperature != 1:
            logits = logits / options.temperature
        filtered = filter_logits(logits, top_k=options.top_k, top_p=options.top_p)
        uniforms = self._new_uniforms(scale, round_index) if round_index else self._uniforms[scale]
        token_ids = draw_tokens(filtered, uniforms)
        if not options.smooth:
            return ScaleDraw(token_ids, self._tokenizer.lookup(token_ids), logits)
        ratio = _position(self.schedule.sizes[scale], self._tokenizer.schedule.sizes)
        gumbels = token_gumbels(
            self.image_seeds, scale, length, self._codebook.shape[0], round_index=round_index,
            purpose=self._streams.gumbels,
        )  # fmt: skip
        mixed = smooth_weights(filtered, gumbels, ratio) @ self._codebook.float()
        return ScaleDraw(token_ids, tokens_to_map(mixed), logits)

    @torch.inference_mode()
    def add(self, scale: int, features: LatentMap, codes: FeatureMap) -> LatentMap:
        """Features after `scale`: those before it plus phi of the upsampled codes."""
        return self._tokenizer.add_codes(features, codes, scale, self.schedule)

    @torch.inference_mode()
    def lookup(self, token_ids: ScaleTokens) -> FeatureMap:
        """Codes of one scale as a map (b, d, s, s)."""
        return self._tokenizer.lookup(token_ids)

    @torch.inference_mode()
    def requantize(self, features: LatentMap, num_scales: int | None = None) -> TokenPyramid:
        """Token ids of features, as if they were latents of an image, under this sampler's schedule.

        `num_scales` searches the first scales only; None all.
        """
        return self._tokenizer.requantize(features, self.schedule, num_scales=num_scales)

    @property
    def has_cache(self) -> bool:
        """Whether a scale reads keys and values of earlier ones (causal models)."""
        return self._cache is not None

    def _new_uniforms(self, scale: int, round_index: int) -> Float[Tensor, "b l"]:
        length = self.schedule.lengths[scale]
        purpose = self._streams.uniforms
        uniforms = token_uniforms(self.image_seeds, scale, length, round_index=round_index, purpose=purpose)
        return uniforms.to(self._transformer.device)

    def cut(self, scale: int) -> None:
        """Forget the keys and values of `scale` and of all after it; nothing to do without a cache."""
        if self._cache is not None:
            self._cache.truncate(self.schedule.offsets[scale])


def _position(side: int, parent_sizes: Sequence[int]) -> float:
    """Where a side lies among the parent's scales, in [0, 1]: a shortened schedule is smoothed as the full one is."""
    return parent_sizes.index(side) / (len(parent_sizes) - 1) if len(parent_sizes) > 1 else 1.0


def _condition_once(
    transformer: NextScaleTransformer, class_labels: Int[Tensor, " b"], *, with_null_rows: bool
) -> Conditioning:
    """Modulations of the labels, then (where asked) as many null rows; every label is computed once."""
    if with_null_rows:
        class_labels = torch.cat([class_labels, torch.full_like(class_labels, transformer.null_class_id)])
    labels, row = class_labels.unique(return_inverse=True)
    once = transformer.condition(labels)
    return Conditioning(once.start[row], tuple(block[row] for block in once.blocks), once.head[row])
