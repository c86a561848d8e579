"""The pipeline of the next-scale family (VAR and SRDD): labels, prompts and seeds to images, edits, likelihoods."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.files import sha256_of_parts
from isthmus.next_scale.canvas import Canvas, MaskInput, extended, open_images, place, project_onto_small, to_masks
from isthmus.next_scale.editing import jumps_of, known_part, num_results, one_each
from isthmus.next_scale.likelihood import (
    check_token_ids,
    diffusion_bound,
    evidence_map,
    score_classes,
    signal_to_noise,
    token_evidence,
    token_log_likelihood,
)
from isthmus.next_scale.options import InpaintOptions, NextScaleOptions, ReadOptions
from isthmus.next_scale.prompts import check_widths, moved, read_null_text, read_texts, save_null_text
from isthmus.next_scale.refinement import Forwards, KnownPart, RefinementMode, ScaleRefinementScheduler, refined_scales
from isthmus.next_scale.sampling import AskedTexts, ScaleSampler, original_sizes, shared_schedule
from isthmus.next_scale.tokenizer import MultiScaleVQVAE, latents_of, pixels_of
from isthmus.next_scale.transformer import NextScaleTransformer
from isthmus.nn.draws import DRAW_STREAMS, EDIT_STREAMS, TokenStreams
from isthmus.nn.shapes import Images, LatentMap, TokenPyramid
from isthmus.pipelines.base import SavedPipeline
from isthmus.pipelines.classification import CandidateScores
from isthmus.pipelines.images import ImageInput, to_images
from isthmus.pipelines.labels import label_list
from isthmus.pipelines.memory import images_that_fit, tokens_that_fit
from isthmus.pipelines.options import OutputType, SamplingOptions
from isthmus.pipelines.prompts import Asked, number_of_texts, prompt_list
from isthmus.pipelines.request import (
    GenerationStep,
    Labels,
    Pictures,
    Request,
    as_output,
    check_output_type,
    takes,
)
from isthmus.text.encoders import SmallTextEncoder, TextFeatures
from isthmus.text.pretrained import PretrainedTextEncoder
from isthmus.text.reading import TextReader


@dataclass
class NextScalePipelineOutput:
    """What a call returns.

    Attributes:
        images: as `output_type` says; "latent" gives the features (b, d, grid, grid).
        token_ids: one int tensor (b, s_k * s_k) per scale, on the CPU.
        class_labels: class id of every image; `null_class_id` where no class was asked for.
        seeds: (seed, image index) of every image: `pipe(label, seed=seed, image_index=index)` draws it again.
        num_forwards: predictions of a scale that the transformer made; labelled and null rows of a scale are one.
        prompts: the prompt of every image; None for models that read no text, and where `text` took their place.
    """

    images: Pictures
    token_ids: list[Int[Tensor, "b _"]]
    class_labels: list[int]
    seeds: list[tuple[int, int]]
    num_forwards: int
    prompts: list[str] | None = None


@dataclass
class _OwnRequest(Request):
    """A request, the height and width that each image is drawn as if it had, and what reads the prompts."""

    image_sizes: Int[Tensor, "b 2"] | None
    text_reader: TextReader | None


_MOST_AT_ONCE = 32  # more images at once are no faster
_SEAM_PARTS = 16  # the seam is this part of the image's side: half a cell of the published latent grid


class NextScalePipeline(SavedPipeline):
    """An image tokenizer and a next-scale transformer that draw images together.

    Images to read are PIL pictures (at least as large as the stride, resized and cropped to the model's size), tensors
    (b, 3, h, w) in [-1, 1] of that size, or several of these. So many go through at once as fit into half of the memory
    that is free; results do not depend on it. Tokens and numbers come back on the CPU, pictures as tensors and features
    on the model's device.

    Edits take one image or several, and class labels (or a prompt, as an option) of what the results are to be (None:
    no class, and no guidance). Single images, masks, labels and prompts serve all results, of which `num_images` asks
    for more. Their options are those of a call, and so are the seeds: an edit depends on its own seed and not on its
    batch. Its random numbers are none of those that draw an image from that seed. The model's scheduler refines draws,
    not edits: an edit draws every token once, and `jumps` is its own way to draw some again. A picture of any size is
    scaled so that its longer side is the model's `image_size`; what the model makes beside the shorter side is cut off
    again.

    Args:
        image_tokenizer: turns tokens into pixels.
        transformer: predicts the tokens of a scale; its scales are the tokenizer's, or some of them.
        scheduler: optional component: which tokens a draw draws again. None draws each once.
        class_names: one name per class, or index -> name; nothing for models without names.
        sampling_defaults: options of a call that names none, stored in the folder.
        preprocessing: how training images were made; None describes the usual way.
        data: `name` and `attribution` (licence line) of the training data, and a `prompt` as an example, for the card.
        protocol: how the model was trained and measured, for the card.
        text_encoder: optional component: reads prompts, for a transformer that is told of them. Without it calls take
            `text` in the place of prompts.
        null_text: what the encoder makes of the empty prompt, one row; None asks the encoder.

    Another `text_encoder` may be set later, of the same widths: the null text becomes its own.

    Raises UserError where the components do not belong together, or names or defaults do not fit them; and every method
    does for what it cannot use, before anything is drawn.
    """

    parts = {"image_tokenizer": MultiScaleVQVAE, "transformer": NextScaleTransformer}
    optional_parts = {
        "scheduler": ScaleRefinementScheduler,
        "text_encoder": (SmallTextEncoder, PretrainedTextEncoder),
    }
    edits = ("inpaint", "outpaint", "super_resolve", "edit_class", "variations")

    def __init__(
        self,
        image_tokenizer: MultiScaleVQVAE,
        transformer: NextScaleTransformer,
        scheduler: ScaleRefinementScheduler | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        sampling_defaults: SamplingOptions | Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        protocol: str = "",
        text_encoder: SmallTextEncoder | PretrainedTextEncoder | None = None,
        null_text: TextFeatures | None = None,
    ):
        self.image_tokenizer, self.transformer, self.scheduler = image_tokenizer, transformer, scheduler
        self.schedule = shared_schedule(image_tokenizer, transformer)
        self.num_classes: int = transformer.null_class_id
        self.text_encoder = text_encoder
        self._null_text = self._checked_null_text(text_encoder, null_text)
        self._describe(class_names, sampling_defaults, preprocessing, data, protocol)
        if scheduler is not None:
            scheduler.rounds_of(self.schedule.num_scales)

    def __setattr__(self, name: str, value: Any) -> None:
        # another encoder makes another text of the empty prompt; without one the model is guided as before
        other = name == "text_encoder" and value is not None and "_null_text" in vars(self)
        null_text = self._checked_null_text(value, None) if other else None
        super().__setattr__(name, value)
        if other:
            self._null_text = null_text

    @takes(NextScaleOptions)
    def __call__(
        self,
        class_labels: Labels = None,
        num_images: SupportsIndex | None = None,
        *,
        num_images_per_class: SupportsIndex = 1,
        callback_on_step_end: Callable[[GenerationStep], object] | None = None,
        **options: Unpack[NextScaleOptions],
    ) -> NextScalePipelineOutput:
        """Draw images.

        Guidance, filters (None turns one off), temperature and `smooth` default to the values saved with the model.

        Args:
            class_labels: names, indices or None (no class), one per image; a single one may stand alone.
            num_images: how many images in all, labels and prompts taken in turn; None draws one of each.
            num_images_per_class: images per label and prompt, next to each other, where `num_images` is not given.
            callback_on_step_end: called with a `GenerationStep` (without preview) after every scale.
            options: see `NextScaleOptions`.
        """
        request = self._request(class_labels, num_images, num_images_per_class, options)
        return self._with_pictures(self._drawn(request, self.scheduler, on_step=callback_on_step_end), request)

    @takes(NextScaleOptions)
    def stream(
        self,
        class_labels: Labels = None,
        num_images: SupportsIndex | None = None,
        *,
        num_images_per_class: SupportsIndex = 1,
        **options: Unpack[NextScaleOptions],
    ) -> Iterator[GenerationStep]:
        """Draw images and show them while they grow: one `GenerationStep` with a preview per scale.

        Where the scheduler jumps back, the scales that it repeats are shown again, under their own index. The
        arguments, the tokens and the last preview are those of a call.
        """
        request = self._request(class_labels, num_images, num_images_per_class, options)
        total, form = self.schedule.num_scales, request.output_type
        return (
            GenerationStep(scale.index, total, scale.token_ids.cpu(), self._pictures(scale.features, form))
            for scale in refined_scales(self._sampler(request, DRAW_STREAMS), self.scheduler)
        )

    @takes(InpaintOptions)
    def inpaint(
        self,
        image: ImageInput,
        mask: MaskInput,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        **options: Unpack[InpaintOptions],
    ) -> NextScalePipelineOutput:
        """Make the pixels under the mask anew. What lies there now is not read.

        Args:
            mask: of the image's size; white (1) is made, black (0) is kept. As images: one, or one each.
            options: see `InpaintOptions`.
        """
        images, masks = open_images(image), to_masks(mask)
        rows = num_results(num_images, image=images, mask=masks, **_conditions(class_labels, options))
        return self._inpaint(images, masks, rows, class_labels, options)

    @takes(InpaintOptions)
    def outpaint(
        self,
        image: ImageInput,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        **options: Unpack[InpaintOptions],
    ) -> NextScalePipelineOutput:
        """Make what lies beyond the edges: the picture with margins of so many of its pixels, at the model's size.

        Args:
            left: pixels to add at the left, as at the other three edges.
            options: see `InpaintOptions`.
        """
        images = open_images(image)
        rows = num_results(num_images, image=images, **_conditions(class_labels, options))
        stride, device = self.image_tokenizer.stride, self.device
        larger, masks = zip(
            *(extended(one.to(device), stride, left, top, right, bottom) for one in images), strict=True
        )
        return self._inpaint(larger, masks, rows, class_labels, options)

    @takes(InpaintOptions)
    def edit_class(
        self,
        image: ImageInput,
        mask: MaskInput,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        **options: Unpack[InpaintOptions],
    ) -> NextScalePipelineOutput:
        """Make the pixels under the mask anew, as part of an image of another class or prompt; arguments as for
        `inpaint`.
        """
        wordless = options.get("text") is None and "" in prompt_list(options.get("prompt"))
        if wordless and any(label is None for label in label_list(class_labels)):
            if self.num_classes == 0 and self.reads_text:
                raise UserError("edit_class needs a prompt for every image, got none. Use inpaint for edits without.")
            raise UserError("edit_class needs a class for every image, got None. Use inpaint for edits without one.")
        return self.inpaint(image, mask, class_labels, num_images=num_images, **options)

    @takes(NextScaleOptions)
    def super_resolve(
        self,
        image: ImageInput,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        from_scale: int | None = None,
        max_unknown: float | Sequence[float] | None = None,
        paste: bool = True,
        **options: Unpack[NextScaleOptions],
    ) -> NextScalePipelineOutput:
        """A small image at the model's size: it says what the coarse scales are, and the finer ones are drawn.

        Args:
            image: smaller than the model's images.
            from_scale: the first scale (from 0) that is drawn; None is the first whose tokens are finer than the small
                image can tell.
            max_unknown: as for `inpaint`, beside the shorter side of a picture that is no square.
            paste: mend the result so that, averaged to the small image's size, it is the small image.
            options: see `NextScaleOptions`.
        """
        images, side, stride = open_images(image), self.image_size, self.image_tokenizer.stride
        rows = num_results(num_images, image=images, **_conditions(class_labels, options))
        images = [one.to(self.device) for one in images]
        largest = {max(one.shape[-2:]) for one in images}
        if max(largest) >= side:
            raise UserError(f"super-resolution makes images of {side} pixels out of smaller ones, got {max(largest)}.")
        if from_scale is None:
            if len(largest) > 1:
                raise UserError(
                    f"small images of several sizes have different scales to keep, got longer sides {sorted(largest)}. "
                    "Pass images of one size, or from_scale."
                )
            from_scale = sum(size * stride <= max(largest) for size in self.schedule.sizes)
        canvas = place(images, [torch.zeros_like(one[:, :1]) for one in images], side, stride=stride)
        request = self._request(class_labels, rows, 1, options)

        def mended(made: Images) -> Images:
            for one, small, box in zip(made, one_each(images, rows), one_each(canvas.boxes, rows), strict=True):
                left, top, right, bottom = box
                picture = one[None, :, top:bottom, left:right]
                one[:, top:bottom, left:right] = project_onto_small(picture, small)[0]
            return made

        rule = {"max_unknown": max_unknown, "from_scale": from_scale}
        return self._edited(canvas, request, rule, None, mended if paste else None)

    @takes(NextScaleOptions)
    def variations(
        self,
        image: ImageInput,
        from_scale: int,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        **options: Unpack[NextScaleOptions],
    ) -> NextScalePipelineOutput:
        """Images that share the scales before `from_scale` with `image`, which is resized and cropped as by `encode`.

        Args:
            from_scale: first scale (from 0) that is drawn; 0 keeps nothing, the number of scales everything.
            options: see `NextScaleOptions`.
        """
        images = to_images(image, self.image_size, stride=self.image_tokenizer.stride).to(self.device)
        rows = num_results(num_images, image=list(images), **_conditions(class_labels, options))
        request = self._request(class_labels, rows, 1, options)
        mask = torch.zeros_like(images[:, :1])
        known = known_part(self.image_tokenizer, self.schedule, images, mask, from_scale=from_scale, num_results=rows)
        return self._with_pictures(self._drawn(request, None, known), request)

    def encode(self, images: ImageInput) -> TokenPyramid:
        """Token ids of every scale, one int tensor (b, s_k * s_k) each, coarse to fine, on the CPU.

        The tokenizer computes in the type it was loaded in: in bfloat16 the ids of many images differ from float32.
        """
        with torch.no_grad():
            token_ids = [self.image_tokenizer.requantize(part, self.schedule) for part in self._latents(images)]
        return [torch.cat(parts).cpu() for parts in zip(*token_ids, strict=True)]

    def decode(self, token_ids: TokenPyramid, *, output_type: OutputType = "pil") -> Pictures:
        """Images from token ids; with the first scales alone, what the image looks like at that state."""
        check_output_type(output_type)
        count = max(1, min(len(token_ids), self.schedule.num_scales))
        check_token_ids(token_ids, self.schedule.lengths[:count], self.codebook_size)
        images = []
        with torch.no_grad():
            for part in _parts(token_ids, self._images_at_once()):
                rows = [ids.long().to(self.device) for ids in part]
                features = self.image_tokenizer.features_up_to(rows, len(rows) - 1, self.schedule)
                images.append(features if output_type == "latent" else pixels_of(self.image_tokenizer, features))
        joined = torch.cat(images)
        return joined if output_type == "latent" else as_output(joined, output_type)

    def reconstruct(
        self, images: ImageInput, num_scales: int | None = None, *, output_type: OutputType = "pil"
    ) -> Pictures:
        """Images through their own tokens and back; from the first `num_scales` scales only, where that is given."""
        count = self.schedule.num_scales if num_scales is None else num_scales
        if not 1 <= count <= self.schedule.num_scales:
            raise UserError(f"num_scales must lie in 1..{self.schedule.num_scales}, got {num_scales}.")
        return self.decode(self.encode(images)[:count], output_type=output_type)

    @takes(ReadOptions)
    def log_prob(
        self, images: ImageInput | None = None, class_labels: Labels = None, **given: Unpack[ReadOptions]
    ) -> Float[Tensor, " b"]:
        """Exact log-likelihood, in nats, of the tokens of images, or of `token_ids` as `encode` returns them.

        It is that of the model without guidance and filters, at temperature 1, under `class_labels` (names, indices or
        None for no class) and under `prompt`, or `text` in its place, where the model reads text: one per image or one
        for all. Raises UserError where something is not usable, or both or neither of images and tokens are given.

        Args:
            options: see `ReadOptions`.
        """
        return self._token_nats(images, class_labels, **given).sum(dim=1)

    @takes(ReadOptions)
    def bits_per_token(
        self, images: ImageInput | None = None, class_labels: Labels = None, **given: Unpack[ReadOptions]
    ) -> Float[Tensor, "_ n"]:
        """Bits that every token costs, in the order of generation; arguments as for `log_prob`."""
        return -self._token_nats(images, class_labels, **given) / math.log(2)

    @takes(ReadOptions)
    def elbo(
        self, images: ImageInput | None = None, class_labels: Labels = None, **given: Unpack[ReadOptions]
    ) -> Float[Tensor, " b"]:
        """The discrete-diffusion bound on `log_prob`, in nats, one forward per scale: the two are equal."""

        def bound(*read: Any) -> Tensor:
            return diffusion_bound(*read).elbo

        return self._measured(bound, images, class_labels, **given)

    @takes(ReadOptions)
    def bits_per_pixel(
        self, images: ImageInput | None = None, class_labels: Labels = None, **given: Unpack[ReadOptions]
    ) -> Float[Tensor, " b"]:
        """Bits of the token pyramid over the number of pixels: what compressing the tokens would take.

        It is no likelihood of the pixels, which the tokens do not fix. Arguments as for `log_prob`.
        """
        nats = self.log_prob(images, class_labels, **given)
        return -nats / math.log(2) / self.image_size**2

    def signal_to_noise(self, images: ImageInput) -> Float[Tensor, " scales"]:
        """Mean over images of ||f||^2 / ||f - Fhat_n||^2 in dB, after every scale."""
        rows = [signal_to_noise(self.image_tokenizer, part, self.schedule) for part in self._latents(images)]
        return torch.cat(rows).mean(dim=0).cpu()

    @takes(ReadOptions)
    def evidence(
        self, images: ImageInput | None = None, class_labels: Labels = None, **given: Unpack[ReadOptions]
    ) -> Float[Tensor, "b grid grid"]:
        """Where an image speaks for its class or prompt: nats of pointwise mutual information per cell of the latent
        grid.

        log p(token | class) - log p(token | no class), each token spread over its cell, all scales added. A map's sum
        is log p(image's tokens | class) - log p(image's tokens). Arguments as for `log_prob`, every label a class or
        every prompt some words.
        `isthmus.pictures.heat_map` draws it over the central square of a picture, which is what is read of one.
        """
        if given.get("text") is None:
            self._check_evidence(class_labels, given.get("prompt"))
        measure = partial(token_evidence, null_text=self.null_text)
        return evidence_map(self._measured(measure, images, class_labels, **given), self.schedule)

    def prepared(self, num_images: int, *, compiled: bool = False) -> dict[str, Any]:
        """Arguments for many calls: what reads their prompts, each once. `compiled` runs the transformer's blocks
        through `torch.compile` from now on.
        """
        if compiled:
            self.transformer.compile_blocks()
        return {} if self.text_encoder is None else {"text_reader": self.text_reader()}

    def refine_with(self, mode: RefinementMode) -> None:
        """Draw tokens again from now on, with the rounds that are usual in `mode`; "none" draws each once.

        Sets `scheduler`, which is saved with the model and part of its fingerprint; "none" leaves it out.
        """
        scheduler = ScaleRefinementScheduler(mode=mode)
        scheduler.rounds_of(self.schedule.num_scales)
        # left out, not one that does nothing: a model whose images are equal keeps its fingerprint
        self.scheduler = None if mode == "none" else scheduler

    def forwards_per_image(self, options: SamplingOptions) -> Forwards:
        """Predictions of a scale in one draw, rounds included."""
        scheduler = self.scheduler or ScaleRefinementScheduler()
        cached, scales = not self.transformer.is_markov, self.schedule.num_scales
        return scheduler.forwards_of(scales, has_cache=cached, smooth=bool(options.smooth))

    @property
    def reads_text(self) -> bool:
        """Whether images follow prompts."""
        return self.transformer.config["text_pooled_width"] is not None

    @property
    def null_text(self) -> TextFeatures | None:
        """What the encoder made of the empty prompt, one row; None where the model reads no text."""
        return None if self._null_text is None else moved(self._null_text, self.device)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the constructor."""
        return {**super().arguments, "null_text": self._null_text}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of configuration and weights of all components, and of the null text."""
        if self._null_text is None:
            return super().fingerprint
        return sha256_of_parts(super().fingerprint, *(_bytes(one) for one in vars(self._null_text).values()))

    def save_pretrained(
        self, save_directory: str | Path, *, max_shard_size: int | str | None = None, text_encoder: bool = True
    ) -> None:
        """Write the pipeline folder: model_index.json, components as safetensors, and the card README.md.

        A new or empty folder appears whole or not at all. In a folder that has other files they stay, and ours take
        the place of earlier ones when all are written. `text_encoder` False leaves the encoder out: what is read back
        takes `text` in the place of prompts.
        """
        saved = self
        if not text_encoder:
            saved = copy.copy(self)
            saved.text_encoder = None
        super(NextScalePipeline, saved).save_pretrained(save_directory, max_shard_size=max_shard_size)

    def _write(self, folder: Path, max_shard_size: int | str | None) -> None:
        if self._null_text is not None:
            save_null_text(self._null_text, folder)
        super()._write(folder, max_shard_size)

    @classmethod
    def _read_beside(cls, folder: Path) -> dict[str, Any]:
        null_text = read_null_text(folder)
        return {} if null_text is None else {"null_text": null_text}

    @property
    def codebook_size(self) -> int:
        """Number of codes a token is drawn from."""
        return self.image_tokenizer.config["codebook_size"]

    @property
    def num_guided_steps(self) -> int:
        """Number of scales."""
        return self.schedule.num_scales

    @property
    def kind(self) -> str:
        """What the model is, in a few words."""
        markov = self.transformer.is_markov
        return "SRDD (next-scale transformer, Markov over scales)" if markov else "VAR (next-scale transformer)"

    @property
    def layout(self) -> str:
        """The scales, in a sentence for the card."""
        return f"Scales: {', '.join(map(str, self.schedule.sizes))}."

    def step_names(self, num_steps: int) -> list[str]:
        """Sides of the scales."""
        return [f"{side} x {side}" for side in self.schedule.sizes[:num_steps]]

    @property
    def stage_lengths(self) -> dict[str, int]:
        """Tokens of every scale, by its side."""
        return dict(zip(self.step_names(self.schedule.num_scales), self.schedule.lengths, strict=True))

    def reconstruct_by_stage(self, images: Images, *, first_index: int = 0) -> dict[str, Images]:
        """From the first scale, the first two, and so on."""
        token_ids, found = self.encode(images), {}
        for scale, name in enumerate(self.step_names(len(token_ids))):
            drawn = torch.as_tensor(self.decode(token_ids[: scale + 1], output_type="pt"))
            found[f"up to {name}"] = drawn * 2 - 1
        return found

    def bytes_per_image(self, *, guided: bool) -> int:
        """Peak bytes that one more image in a batch takes, roughly: of the last scale in the transformer (feed-forward,
        keys and values, logits and their sorted and cumulated copies), or of the widest maps of the pixel decoder.
        """
        config, schedule = self.transformer.config, self.schedule
        width, tokens, rows = config["width"], schedule.lengths[-1], 2 if guided else 1
        size = 2 if self.transformer.dtype == torch.bfloat16 else 4
        block = tokens * width * (10 + 2 * config["mlp_ratio"]) * size
        cache = 0 if self.transformer.is_markov else 2 * config["num_layers"] * schedule.num_tokens * width * size
        if config["text_width"] is not None and self.text_encoder is not None:
            cache += 2 * config["num_layers"] * self.text_encoder.config["max_length"] * width * size
        logits = tokens * config["codebook_size"] * 4 * 2
        draw = tokens * config["codebook_size"] * (5 * 4 + 2 * 8)
        pixels = self.image_size**2 * self.image_tokenizer.config["base_channels"] * 4 * 6
        return int(max(rows * (block + cache + logits) + draw, pixels))

    def _checked_null_text(
        self, encoder: SmallTextEncoder | PretrainedTextEncoder | None, null_text: TextFeatures | None
    ) -> TextFeatures | None:
        """The null text of a model that reads prompts; UserError where it, or the encoder, does not fit it."""
        if not self.reads_text:
            if encoder is not None or null_text is not None:
                raise UserError(
                    "this transformer reads no text, got a text encoder or a null text. Pass a transformer with "
                    "text_pooled_width, or leave it out."
                )
            return None
        if encoder is not None:
            check_widths(encoder.text_width, encoder.pooled_width, self.transformer, "the text encoder")
        if null_text is None:
            if encoder is None:
                raise UserError(
                    "a transformer that reads text needs a text encoder, or the null text that one made of the empty "
                    "prompt, got neither. Pass text_encoder or null_text."
                )
            with torch.no_grad():
                null_text = encoder.encode([""])
        if len(null_text) != 1:
            raise UserError(f"null_text is the text of one prompt, the empty one, got {len(null_text)} rows.")
        check_widths(null_text.hidden.shape[-1], null_text.pooled.shape[-1], self.transformer, "the null text")
        return null_text

    def asked(
        self,
        class_labels: Labels,
        prompt: object = None,
        text: TextFeatures | None = None,
        negative_prompt: object = None,
    ) -> Asked:
        """What images are to be, one class and one text each; no prompt is read yet.

        Arguments as for a call. Raises UserError where they do not fit each other or the model.
        """
        if text is not None and self.reads_text:
            check_widths(text.hidden.shape[-1], text.pooled.shape[-1], self.transformer, "text")
        return super().asked(class_labels, prompt, text, negative_prompt)

    def _texts(self, asked: Asked, reader: TextReader | None = None) -> AskedTexts | None:
        """What the transformer is told of the prompts; None where it reads none."""
        null_text = self.null_text
        if null_text is None:
            return None
        if reader is None:
            reader = self.text_reader()
        elif reader.encoder is not self.text_encoder:
            raise UserError("text_reader reads with another text encoder than this model's. Pass pipe.text_reader().")
        return read_texts(asked, reader, null_text)

    def text_reader(self) -> TextReader | None:
        """Reads prompts once, for many calls: a call reads its own anew where it is given none. None where the model
        has no text encoder.
        """
        return None if self.text_encoder is None else TextReader(self.text_encoder)

    def _request(
        self,
        class_labels: Labels,
        num_images: SupportsIndex | None,
        num_images_per_class: SupportsIndex,
        options: Mapping[str, Any],
    ) -> "_OwnRequest":
        request = super()._request(class_labels, num_images, num_images_per_class, options)
        sizes = original_sizes(options["image_size_condition"], len(request.seeds), self.transformer)
        return _OwnRequest(**vars(request), image_sizes=sizes, text_reader=options["text_reader"])

    def _sampler(self, request: "_OwnRequest", streams: TokenStreams) -> ScaleSampler:
        return ScaleSampler(
            self.image_tokenizer,
            self.transformer,
            torch.tensor(request.class_labels, device=self.device),
            request.seeds,
            request.options,
            streams,
            self._texts(request.asked, request.text_reader),
            request.image_sizes,
        )

    def _pictures(self, features: LatentMap, output_type: OutputType) -> Pictures:
        if output_type == "latent":
            return features.clone()  # the loop goes on with its own
        return as_output(pixels_of(self.image_tokenizer, features), output_type)

    def _drawn(
        self,
        request: _OwnRequest,
        scheduler: ScaleRefinementScheduler | None,
        known: KnownPart | None = None,
        on_step: Callable[[GenerationStep], object] | None = None,
    ) -> NextScalePipelineOutput:
        """What a request (an edit, where something is known) makes, its images being the features."""
        sampler = self._sampler(request, DRAW_STREAMS if known is None else EDIT_STREAMS)
        token_ids: list[Tensor] = [torch.empty(0)] * self.schedule.num_scales
        features = sampler.start()
        for scale in refined_scales(sampler, scheduler, known):
            # a jump draws a scale once more: the last draw counts
            token_ids[scale.index], features = scale.token_ids.cpu(), scale.features
            if on_step is not None:
                on_step(GenerationStep(scale.index, self.schedule.num_scales, token_ids[scale.index]))
        return NextScalePipelineOutput(
            features, token_ids, request.class_labels, request.seeds, sampler.num_forwards, request.asked.prompts
        )

    def _with_pictures(self, drawn: NextScalePipelineOutput, request: Request) -> NextScalePipelineOutput:
        assert isinstance(drawn.images, Tensor), "the features"
        return replace(drawn, images=self._pictures(drawn.images, request.output_type))

    def _inpaint(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        rows: int,
        class_labels: Labels,
        options: Mapping[str, Any],
    ) -> NextScalePipelineOutput:
        """An edit of placed images; `options` holds every one of `InpaintOptions`."""
        request = self._request(class_labels, rows, 1, options)
        back = jumps_of(options["jumps"], options["jump_scales"], self.schedule.num_scales)
        paste, seam_px = options["paste"], options["seam_px"]
        if seam_px is not None and not paste:
            raise UserError(f"seam_px blends the pasted pixels, got {seam_px} with paste=False. Leave it out.")
        seam_px = max(1, self.image_size // _SEAM_PARTS) if seam_px is None else seam_px
        if not 0 <= seam_px <= self.image_size:
            raise UserError(f"seam_px must lie in 0..{self.image_size} (pixels), got {seam_px}. 0 is a sharp seam.")
        # one image and one mask are placed and encoded once, however many results they serve
        sources = max(len(images), len(masks))
        images, masks = ([one.to(self.device) for one in one_each(given, sources)] for given in (images, masks))
        keeping, stride = options["keeping"], self.image_tokenizer.stride
        canvas = place(images, masks, self.image_size, stride=stride, hide=keeping != "published")
        rule = {"keeping": keeping, "max_unknown": options["max_unknown"]}
        return self._edited(canvas, request, rule, back, (lambda made: canvas.pasted(made, seam_px)) if paste else None)

    def _edited(
        self,
        canvas: Canvas,
        request: _OwnRequest,
        rule: Mapping[str, Any],
        jumps: ScaleRefinementScheduler | None,
        paste: Callable[[Images], Images] | None,
    ) -> NextScalePipelineOutput:
        """An edit that keeps of a canvas what the rule (of `known_part`) says; `paste` puts known pixels back."""
        canvas.check_output_type(request.output_type)
        known = known_part(
            self.image_tokenizer, self.schedule, canvas.pixels, canvas.mask, num_results=len(request.seeds), **rule
        )
        edited = self._drawn(request, jumps, known)
        if request.output_type == "latent":
            return edited
        assert isinstance(edited.images, Tensor), "the features"
        # the arithmetic of pixels is fp32, whatever the type of the weights
        made = pixels_of(self.image_tokenizer, edited.images).float()
        return replace(edited, images=canvas.cut(paste(made) if paste else made, request.output_type))

    def _latents(self, images: ImageInput) -> list[Tensor]:
        """Maps (b, d, grid, grid) of a few images each."""
        given = to_images(images, self.image_size, stride=self.image_tokenizer.stride)
        return [latents_of(self.image_tokenizer, part) for part in given.split(self._images_at_once())]

    def _images_at_once(self) -> int:
        """How many images fit, whatever is done with them: pixels, a draw, or all tokens in one teacher-forced pass."""
        each = max(self.schedule.num_tokens * self._token_bytes(), self.bytes_per_image(guided=False))
        return min(_MOST_AT_ONCE, images_that_fit(self.device, each))

    def _token_nats(
        self,
        images: ImageInput | None,
        class_labels: Labels,
        token_ids: Any,
        prompt: object = None,
        text: TextFeatures | None = None,
    ) -> Float[Tensor, "_ n"]:
        return self._measured(token_log_likelihood, images, class_labels, token_ids, prompt, text)

    def _measured(
        self,
        measure: Callable[..., Tensor],
        images: ImageInput | None,
        class_labels: Labels,
        token_ids: TokenPyramid | None,
        prompt: object = None,
        text: TextFeatures | None = None,
    ) -> Tensor:
        """`measure` (of tokenizer, transformer, token ids, labels, text) of a few images at a time, on the CPU."""
        asked, pyramid = self.asked(class_labels, prompt, text), self._tokens_of(images, token_ids)
        check_token_ids(pyramid, self.schedule.lengths, self.codebook_size)
        number = len(pyramid[0])
        if len(asked) not in (1, number):
            what = "class label or prompt" if self.reads_text else "class label"
            raise UserError(f"a likelihood needs one {what}, or one per image ({number}), got {len(asked)}.")
        asked = asked.images([0] * number) if len(asked) == 1 else asked
        texts, at_once = self._texts(asked), self._images_at_once()
        made, index = [], torch.arange(number)
        for part, some in zip(_parts(pyramid, at_once), index.split(at_once), strict=True):
            told = None if texts is None else texts.features.rows(texts.rows[some.to(self.device)])
            labels = torch.tensor([asked.class_labels[one] for one in some.tolist()])
            made.append(measure(self.image_tokenizer, self.transformer, part, labels, told).cpu())
        return torch.cat(made)

    def _scores(
        self,
        latents: Iterable[Float[Tensor, "rows d grid grid"]],
        asked: Asked,
        *,
        num_views: int,
        keep: int,
        margin_nats: float | None,
    ) -> Iterator[CandidateScores]:
        token_bytes, texts = self._token_bytes(self.transformer.config["num_layers"]), self._texts(asked)
        features = None if texts is None else texts.features.rows(texts.rows)
        for part in latents:
            with torch.no_grad():
                token_ids = self.image_tokenizer.requantize(part, self.schedule)
            yield score_classes(
                self.image_tokenizer, self.transformer, token_ids, asked.class_labels, texts=features,
                keep=keep, margin_nats=margin_nats, num_views=num_views,
                tokens_at_once=tokens_that_fit(self.device, token_bytes),
            )  # fmt: skip

    def _token_bytes(self, kept_layers: int = 0) -> int:
        """Of a token that is read: activations, the keys and values that are kept, and logits."""
        config, size = self.transformer.config, self.transformer.dtype.itemsize
        # keys and values twice: dropping rows copies those that stay
        block = config["width"] * (4 * kept_layers + 10 + 2 * config["mlp_ratio"]) * size
        # logits in the type of the weights, in fp32, and what the cross-entropy makes of them
        return int(block + 4 * config["codebook_size"] * 4)


def _conditions(class_labels: Labels, options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """How many labels and prompts an edit was given, as lists."""
    return {
        "class_label": label_list(class_labels),
        "prompt": list(number_of_texts(options["prompt"], options["text"])),
    }


def _bytes(tensor: Tensor) -> str:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes().hex()


def _parts(token_ids: TokenPyramid, at_once: int) -> list[list[Tensor]]:
    """The same pyramids, a few at a time."""
    return [list(part) for part in zip(*(ids.split(at_once) for ids in token_ids), strict=True)]
