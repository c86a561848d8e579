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
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.draws import DRAW_STREAMS, TokenStreams, token_gumbels, token_uniforms
from isthmus.nn.sampling import draw_tokens, filter_logits, guided_logits, smooth_weights
from isthmus.nn.shapes import FeatureMap, LatentMap, ScaleTokens
from isthmus.pipelines.labels import elements, whole_number
from isthmus.pipelines.options import SamplingOptions, guidance_on
from isthmus.text.encoders import TextFeatures

_LARGEST_SIDE = 1_000_000  # what follows from longer ones does not fit into 32 bits


def shared_schedule(image_tokenizer: MultiScaleVQVAE, transformer: NextScaleTransformer) -> ScaleSchedule:
    """The scales of the transformer with the phi of the tokenizer: the tokenizer's schedule, or one derived from it.

    Raises UserError where the two do not belong together (codebook size, code width or scales differ).
    """
    for name in ("codebook_size", "codebook_dim"):
        ours, theirs = image_tokenizer.config[name], transformer.config[name]
        if ours != theirs:
            raise UserError(
                f"image tokenizer and transformer must have the same {name}, got {ours} and {theirs}. "
                "Pass the tokenizer that the transformer was trained on."
            )
    return image_tokenizer.schedule.derive(transformer.schedule.sizes)


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
        logits: (b, s * s, v), guided and divided by the temperature, not filtered.
    """

    token_ids: ScaleTokens
    codes: FeatureMap
    logits: Float[Tensor, "b l v"]

    @property
    def probabilities(self) -> Float[Tensor, "b l"]:
        """What the guided model, at the temperature of the draw, thinks of the tokens.

        Before the filters: under top_k=1 every token has the whole of what is left, and nothing would tell them apart.
        """
        return self.logits.softmax(dim=-1).gather(-1, self.token_ids.unsqueeze(-1)).squeeze(-1)


@dataclass
class AskedTexts:
    """The prompts of some images, on the transformer's device.

    Attributes:
        features: of distinct prompts; the last is what guidance leads away from: the null text, or a negative prompt
            in its place.
        rows: number of each image's prompt among them.
    """

    features: TextFeatures
    rows: Int[Tensor, " b"]


def original_sizes(
    image_sizes: object, num_images: int, transformer: NextScaleTransformer
) -> Int[Tensor, "b 2"] | None:
    """Height and width in pixels that each image is drawn as if it had, on the CPU, from one pair or one for each.

    None stays None, which is the transformer's own.
    UserError for a transformer without a size condition, and for what are no sizes of these images.
    """
    if image_sizes is None:
        return None
    if transformer.size_condition is None:
        raise UserError(f"this model has no size condition, got image_size_condition {image_sizes!r}. Leave it out.")
    given = elements(image_sizes) or []
    listed = [elements(one) for one in given]
    pairs = [given] * num_images if all(one is None for one in listed) else listed
    if len(pairs) != num_images or any(pair is None or len(pair) != 2 for pair in pairs):
        raise UserError(
            f"image_size_condition is a height and a width, or a pair for each of {num_images} image(s), got "
            f"{image_sizes!r}. Pass (512, 768), for example."
        )
    sides = [[whole_number(side, "image_size_condition") for side in pair or ()] for pair in pairs]
    if strange := [side for pair in sides for side in pair if not 1 <= side <= _LARGEST_SIDE]:
        raise UserError(f"image_size_condition must be pixels, 1..{_LARGEST_SIDE}, got {strange[0]}. Mend it.")
    return torch.tensor(sides)


class ScaleSampler:
    """Predict, draw and add, scale by scale, for loops that may visit a scale again or go back to an earlier one.

    Nothing is remembered between calls but the keys and values of a causal model, which `predict` keeps consistent:
    running a scale forgets it and everything after it first. A loop that changes the tokens of a scale must predict
    the scales after it again, in order.

    Every random number of an image follows from its own pair (seed, image index) in `image_seeds`; `streams` says
    whether those of draws or of edits are read. All sampling arithmetic is fp32, whatever the type of the weights.
    Filters are the caller's to check (`SamplingOptions.check`). `num_forwards` counts the predictions; labelled and
    null rows of a scale are one.

    Guidance leads away from the null label and, of a model of texts, from the last of `texts` together. Everything that
    follows from label, prompt and `image_sizes` (see `original_sizes`) is computed once for each that are asked for
    together. Null rows have the sizes of their images.
    """

    def __init__(
        self,
        image_tokenizer: MultiScaleVQVAE,
        transformer: NextScaleTransformer,
        class_labels: Int[Tensor, " b"],
        image_seeds: Sequence[tuple[int, int]],
        options: SamplingOptions,
        streams: TokenStreams = DRAW_STREAMS,
        texts: AskedTexts | None = None,
        image_sizes: Int[Tensor, "b 2"] | None = None,
    ):
        self.schedule = shared_schedule(image_tokenizer, transformer)
        self.tokenizer, self.options, self.image_seeds, self.num_forwards = image_tokenizer, options, image_seeds, 0
        self._streams, self._transformer, self._codebook = streams, transformer, image_tokenizer.codebook.weight
        self.guidance = guidance_on(options.guidance_scale, self.schedule.sizes, image_tokenizer.schedule.sizes)
        # pairs of a label and the number of a prompt
        prompts = torch.zeros_like(class_labels) if texts is None else texts.rows.to(class_labels)
        asked = torch.stack([class_labels, prompts], dim=1).to(transformer.device)
        sizes = asked.new_zeros(len(asked), 0) if image_sizes is None else image_sizes.to(asked)
        null_prompt = 0 if texts is None else len(texts.features) - 1
        null = asked.new_tensor([[transformer.null_class_id, null_prompt]])
        if bool((asked == null).all()):
            self.guidance = (1.0,) * self.schedule.num_scales  # nothing to guide away from
        self._with_null = null_row_scales(self.guidance, markov=transformer.is_markov)
        self._batch, doubled = len(class_labels), any(self._with_null)
        # ahead of the loop, in which a GPU need not wait for the CPU; rounds after the first make their own
        self._uniforms = [self._new_uniforms(scale, 0) for scale in range(self.schedule.num_scales)]
        asked = torch.cat([asked, sizes], dim=1)
        if doubled:
            asked = torch.cat([asked, torch.cat([null.expand(len(asked), 2), sizes], dim=1)])
        with torch.no_grad():
            distinct, row = asked.unique(dim=0, return_inverse=True)
            text = None if texts is None else texts.features.rows(distinct[:, 1])
            sizes = None if image_sizes is None else distinct[:, 2:]
            self._conditioning = transformer.condition(distinct[:, 0], text, sizes).rows(row)
        self._cache = transformer.new_cache(len(asked))

    def start(self) -> LatentMap:
        """Features before scale 0: zeros."""
        shape = (self._batch, self._codebook.shape[1], self.schedule.grid, self.schedule.grid)
        return torch.zeros(shape, device=self._transformer.device, dtype=torch.float32)

    @torch.no_grad()
    def predict(self, scale: int, features: LatentMap) -> Float[Tensor, "b l v"]:
        """Guided logits of one scale, in fp32, from the features that all earlier scales have built."""
        self._cut(scale)
        if self._cache is not None and self._cache.length != self.schedule.offsets[scale]:
            raise UserError(
                f"a causal model predicts a scale after all earlier ones, got scale {scale} after "
                f"{self._cache.length} tokens. Predict the scales before it first."
            )
        if scale == 0:
            return self._guided(0, self._codebook.new_zeros(self._batch, 0, self._codebook.shape[1]), None)
        return self._guided(scale, next_scale_input(features, self.schedule, scale), None)

    @torch.no_grad()
    def predict_again(
        self, scale: int, features: LatentMap, codes: FeatureMap, hidden: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b l v"]:
        """Guided logits of a scale that sees its own codes (b, d, s, s), but for the hidden ones; `scale` >= 1.

        A round of masked resampling (spec of SRDD, 3.2). A causal model's keys stay those of the ordinary prediction,
        which has to be the latest one.
        """
        inputs = self.tokenizer.partial_scale_input(features, codes.float(), hidden, scale, self.schedule)
        if self._cache is None:
            return self._guided(scale, inputs, hidden)
        start, end = self.schedule.offsets[scale : scale + 2]
        assert self._cache.length == end, "the scale was predicted just before"
        ordinary = self._cache.copy_of(start, end)
        self._cut(scale)
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
        conditioning = self._conditioning.rows(slice(copies * self._batch))
        logits = self._transformer.forward_scale(scale, inputs, conditioning, self._cache, hidden=hidden).float()
        if copies == 1:
            return logits
        return guided_logits(logits[: self._batch], logits[self._batch :], self.guidance[scale])

    @torch.no_grad()
    def draw(self, scale: int, logits: Float[Tensor, "b l v"], *, round_index: int = 0) -> ScaleDraw:
        """Tokens from guided logits, with the random numbers of (seed, image index, scale, round)."""
        options = self.options
        temperature = options.temperature_at(scale)
        if temperature != 1:
            logits = logits / temperature
        filtered = filter_logits(logits, top_k=options.top_k, top_p=options.top_p)
        uniforms = self._new_uniforms(scale, round_index) if round_index else self._uniforms[scale]
        token_ids = draw_tokens(filtered, uniforms)
        # the place among the parent's scales: a shortened schedule is smoothed as the full one is
        sizes, smoothing = self.tokenizer.schedule.sizes, options.smoothing
        place = sizes.index(self.schedule.sizes[scale])
        if smoothing is None or not smoothing.covers(place):
            return ScaleDraw(token_ids, self.tokenizer.lookup(token_ids), logits)
        ratio = place / (len(sizes) - 1) if len(sizes) > 1 else 1.0
        gumbels = token_gumbels(
            self.image_seeds, scale, token_ids.shape[1], self._codebook.shape[0], round_index=round_index,
            purpose=self._streams.gumbels,
        )  # fmt: skip
        mixed = smooth_weights(filtered if smoothing.filtered else logits, gumbels, ratio) @ self._codebook.float()
        return ScaleDraw(token_ids, tokens_to_map(mixed), logits)

    @torch.no_grad()
    def add(self, scale: int, features: LatentMap, codes: FeatureMap) -> LatentMap:
        """Features after `scale`: those before it plus phi of the upsampled codes."""
        return self.tokenizer.add_codes(features, codes, scale, self.schedule)

    @property
    def has_cache(self) -> bool:
        """Whether a scale reads keys and values of earlier ones (causal models)."""
        return self._cache is not None

    def _new_uniforms(self, scale: int, round_index: int) -> Float[Tensor, "b l"]:
        length, purpose = self.schedule.lengths[scale], self._streams.uniforms
        uniforms = token_uniforms(self.image_seeds, scale, length, round_index=round_index, purpose=purpose)
        return uniforms.to(self._transformer.device)

    def _cut(self, scale: int) -> None:
        """Forget the keys and values of `scale` and of all after it; nothing to do without a cache."""
        if self._cache is not None:
            self._cache.truncate(self.schedule.offsets[scale])
