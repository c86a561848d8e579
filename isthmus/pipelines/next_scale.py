"""The pipeline of the next-scale family (VAR and SRDD): labels and seeds in, images out.

Source of the method: Tian et al., "Visual Autoregressive Modeling"; Kumar et al., "Scale-Wise VAR is Secretly Discrete
Diffusion".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from isthmus.functional.draws import DRAW_STREAMS, TokenStreams
from isthmus.functional.guidance import Guidance
from isthmus.functional.shapes import Images, LatentMap
from isthmus.generation.autoencoding import pixels_of
from isthmus.generation.next_scale import ScaleSampler, shared_schedule
from isthmus.generation.options import FOLDER_DEFAULT, Default, SamplingOptions
from isthmus.generation.refinement import refined_scales
from isthmus.generation.step import GenerationStep, Pictures
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pipelines.next_scale_classification import NextScaleClassification
from isthmus.pipelines.next_scale_editing import NextScaleEditing
from isthmus.pipelines.next_scale_output import NextScalePipelineOutput
from isthmus.pipelines.request import Generators, Labels, OutputType, Request, as_output
from isthmus.pipelines.seeds import Whole
from isthmus.schedulers.scale_refinement import RefinementMode, ScaleRefinementScheduler


class NextScalePipeline(NextScaleClassification, NextScaleEditing):
    """An image tokenizer and a next-scale transformer that draw images together.

    Args:
        image_tokenizer: turns tokens into pixels.
        transformer: predicts the tokens of a scale; its scales are the tokenizer's, or some of them.
        scheduler: optional component: which tokens a draw draws again. None draws each once.
        class_names: one name per class, or index -> name; nothing for models without names.
        sampling_defaults: options of a call that names none, stored in the folder.
        preprocessing: how training images were made; None describes the usual way.
        data: `name` and `attribution` (licence line) of the training data, for the card.
        protocol: how the model was trained and measured, for the card.

    Raises:
        UserError: the components do not belong together, or names or defaults do not fit them.
    """

    parts = {"image_tokenizer": MultiScaleVQVAE, "transformer": NextScaleTransformer}
    optional_parts = {"scheduler": ScaleRefinementScheduler}

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
    ):
        self.image_tokenizer, self.transformer, self.scheduler = image_tokenizer, transformer, scheduler
        self.schedule = shared_schedule(image_tokenizer, transformer)
        self.num_classes: int = transformer.null_class_id
        self._describe(class_names, sampling_defaults, preprocessing, data, protocol)
        if scheduler is not None:
            scheduler.rounds_of(self.schedule.num_scales)

    def __call__(
        self,
        class_labels: Labels = None,
        num_images: SupportsIndex | None = None,
        *,
        num_images_per_class: SupportsIndex = 1,
        guidance_scale: Guidance | Default = FOLDER_DEFAULT,
        top_k: int | None | Default = FOLDER_DEFAULT,
        top_p: float | int | None | Default = FOLDER_DEFAULT,
        temperature: float | int | Default = FOLDER_DEFAULT,
        seed: Whole | None = None,
        generator: Generators = None,
        image_index: Whole = 0,
        smooth: bool | Default = FOLDER_DEFAULT,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[[GenerationStep], object] | None = None,
    ) -> NextScalePipelineOutput:
        """Draw images.

        Args:
            class_labels: names, indices or None (no class), one per image; a single one may stand alone.
            num_images: how many images in all, labels taken in turn; None draws one per label.
            num_images_per_class: images per label, next to each other, where `num_images` is not given.
            guidance_scale: guided = uncond + s (cond - uncond), 1 = off: a number, one per scale, or a
                `GuidanceSchedule`. Like every option below it defaults to the value saved with the model.
            top_k: keep the k likeliest codes; None is off.
            top_p: keep the likeliest codes that hold this probability together; None is off.
            temperature: divides the logits.
            seed: one number for the request, or a list with one per image; None draws a fresh one.
            generator: makes the list of seeds instead: one generator, or one per image.
            image_index: number of the first image in the whole request, or one number per image. An image depends
                on its seed and number alone: not on the batch, nor on its place in it.
            smooth: mix codes instead of drawing one (softer images; token ids are drawn all the same).
            output_type: "pil", "np" (b, h, w, 3) or "pt" (b, 3, h, w) in [0, 1], or "latent" (features).
            callback_on_step_end: called with a `GenerationStep` (without preview) after every scale.

        Raises:
            UserError: a label, an option or a seed is not usable; the message says why.
        """
        request = self._request(
            class_labels, num_images, num_images_per_class, seed, generator, image_index, output_type,
            guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, temperature=temperature, smooth=smooth,
        )  # fmt: skip
        sampler = self._sampler(request)
        token_ids: list[Tensor] = [torch.empty(0)] * self.schedule.num_scales
        features = None
        for scale in refined_scales(sampler, self.scheduler):
            # a jump draws a scale once more: the last draw counts
            token_ids[scale.index], features = scale.token_ids.cpu(), scale.features
            if callback_on_step_end is not None:
                callback_on_step_end(GenerationStep(scale.index, self.schedule.num_scales, token_ids[scale.index]))
        assert features is not None
        images = self._pictures(features, request.output_type)
        return NextScalePipelineOutput(images, token_ids, request.class_labels, request.seeds, sampler.num_forwards)

    def stream(
        self,
        class_labels: Labels = None,
        num_images: SupportsIndex | None = None,
        *,
        num_images_per_class: SupportsIndex = 1,
        guidance_scale: Guidance | Default = FOLDER_DEFAULT,
        top_k: int | None | Default = FOLDER_DEFAULT,
        top_p: float | int | None | Default = FOLDER_DEFAULT,
        temperature: float | int | Default = FOLDER_DEFAULT,
        seed: Whole | None = None,
        generator: Generators = None,
        image_index: Whole = 0,
        smooth: bool | Default = FOLDER_DEFAULT,
        output_type: OutputType = "pil",
    ) -> Iterator[GenerationStep]:
        """Draw images and show them while they grow: one `GenerationStep` with a preview per scale.

        Where the scheduler jumps back, the scales that it repeats are shown again, under their own index. The
        arguments, the tokens and the last preview are those of a call. Bad arguments raise at once, before the first
        step is asked for.
        """
        request = self._request(
            class_labels, num_images, num_images_per_class, seed, generator, image_index, output_type,
            guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, temperature=temperature, smooth=smooth,
        )  # fmt: skip
        scales = refined_scales(self._sampler(request), self.scheduler)
        return (
            GenerationStep(
                scale.index,
                self.schedule.num_scales,
                scale.token_ids.cpu(),
                self._pictures(scale.features, output_type),
            )
            for scale in scales
        )

    def prepared(self, num_images: int, *, compiled: bool = False) -> dict[str, Any]:
        """Nothing to pass on; `compiled` runs the transformer's blocks through `torch.compile` from now on.

        Raises:
            UserError: the model is on a CPU without a C++ compiler.
        """
        if compiled:
            self.transformer.compile_blocks()
        return {}

    def refine_with(self, mode: RefinementMode) -> None:
        """Draw tokens again from now on, with the rounds that are usual in `mode`; "none" draws each once.

        Sets `scheduler`, which is saved with the model and part of its fingerprint; "none" leaves it out.

        Raises:
            UserError: there is no such mode, or the model has too few scales for it.
        """
        scheduler = ScaleRefinementScheduler(mode=mode)
        scheduler.rounds_of(self.schedule.num_scales)
        # left out, not one that does nothing: a model whose images are equal keeps its fingerprint
        self.scheduler = None if mode == "none" else scheduler

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

    def bytes_per_image(self, *, guided: bool) -> int:
        """Peak bytes that one more image in a batch takes, roughly.

        Whichever is larger: the last scale in the transformer (feed-forward, keys and values, logits and their sorted
        and cumulated copies), or the widest maps of the pixel decoder.
        """
        config, schedule = self.transformer.config, self.schedule
        width, tokens, rows = config["width"], schedule.lengths[-1], 2 if guided else 1
        size = 2 if self.transformer.dtype == torch.bfloat16 else 4
        block = tokens * width * (10 + 2 * config["mlp_ratio"]) * size
        cache = 0 if self.transformer.is_markov else 2 * config["num_layers"] * schedule.num_tokens * width * size
        logits = tokens * config["codebook_size"] * 4 * 2
        draw = tokens * config["codebook_size"] * (5 * 4 + 2 * 8)
        pixels = self.image_size**2 * self.image_tokenizer.config["base_channels"] * 4 * 6
        return int(max(rows * (block + cache + logits) + draw, pixels))

    def _sampler(self, request: Request, streams: TokenStreams = DRAW_STREAMS) -> ScaleSampler:
        labels = torch.tensor(request.class_labels, device=self.device)
        return ScaleSampler(self.image_tokenizer, self.transformer, labels, request.seeds, request.options, streams)

    def _pictures(self, features: LatentMap, output_type: OutputType) -> Pictures:
        return features if output_type == "latent" else as_output(self._decode(features), output_type)

    def _decode(self, features: LatentMap) -> Images:
        return pixels_of(self.image_tokenizer, features)
