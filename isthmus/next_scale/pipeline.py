"""Zero-shot editing with a next-scale pipeline: inpainting, outpainting, super-resolution, variations.

No training is needed, and any model of the family will do, imported ones included. The method is that of
`isthmus.generation.editing`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.draws import EDIT_STREAMS, TokenStreams
from isthmus.functional.guidance import Guidance
from isthmus.functional.masks import project_onto_small
from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.shapes import Images, LatentMap
from isthmus.generation.editing import Jumps, Keeping, KnownPart, edit_scales, known_part
from isthmus.generation.next_scale import ScaleSampler
from isthmus.generation.options import FOLDER_DEFAULT, Default
from isthmus.generation.step import Pictures
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.pipelines.canvas import Canvas, extended, open_images, place
from isthmus.pipelines.images import ImageInput, to_images
from isthmus.pipelines.labels import whole_number
from isthmus.pipelines.masks import MaskInput, to_masks
from isthmus.pipelines.next_scale_output import NextScalePipelineOutput
from isthmus.pipelines.request import Generators, Labels, OutputType, Request, as_output, label_list
from isthmus.pipelines.saved import SavedPipeline
from isthmus.pipelines.seeds import Whole

_Value = TypeVar("_Value")
_SEAM_PARTS = 16  # the seam is this part of the image's side: half a cell of the published latent grid


class NextScaleEditing(SavedPipeline):
    """Edits of images. Every method takes one image or several; single images, masks and labels serve all of them.

    `options` are those of a call (`guidance_scale`, `top_k`, `top_p`, `temperature`, `smooth`, `seed`, `generator`,
    `image_index`, `output_type`), and so are the seeds: an edit depends on its own seed and not on its batch. Its
    random numbers are none of those that draw an image from that seed. Without a class label an edit is not guided.
    The model's scheduler refines draws, not edits: an edit draws every token once, and `jumps` is its own way to draw
    some again. Pictures as tensors, and features, lie on the model's device.

    A picture of any size is scaled so that its longer side is the model's `image_size`; what the model makes beside the
    shorter side is cut off again.
    """

    image_tokenizer: MultiScaleVQVAE
    schedule: ScaleSchedule

    @abstractmethod
    def _decode(self, features: LatentMap) -> Images:
        """Features to images in [-1, 1]."""

    @abstractmethod
    def _sampler(self, request: Request, streams: TokenStreams) -> ScaleSampler:
        """What predicts and draws for a request, from the random numbers of `streams`."""

    def inpaint(
        self,
        image: ImageInput,
        mask: MaskInput,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        keeping: Keeping = "coverage",
        max_unknown: float | Sequence[float] | None = None,
        jumps: int | Sequence[int] = 0,
        jump_scales: int | None = None,
        paste: bool = True,
        seam_px: int | None = None,
        **options: Any,
    ) -> NextScalePipelineOutput:
        """Make the pixels under the mask anew. What lies there now is not read.

        Args:
            image: what to edit.
            mask: of the image's size; white (1) is made, black (0) is kept. As images: one, or one each.
            class_labels: what the whole image is to be; None asks for no class.
            num_images: results, where images, masks and labels are single ones.
            keeping: "coverage", or "published": VAR's procedure, which also reads what lies under the mask.
            max_unknown: "coverage" keeps a token with at most this share of unknown pixels, in [0, 1); one number, or
                one per scale; None is one half. More keeps more of the coarse scales.
            jumps: simple resampling, times per scale (one number for every scale from `jump_scales` on, counted from
                0, or one each); 0 is off. A jump costs `jump_scales` more forwards.
            jump_scales: scales that a jump draws anew; None is 2. It needs jumps.
            paste: put the known pixels back over the result, blended beside the mask.
            seam_px: width of the blend in pixels of the result, on the known side of the mask; None is 1/16 of the
                model's size. It needs `paste`.
            options: those of a call.

        Raises:
            UserError: an image, a mask or an option is not usable, or an option means nothing beside the others; the
                message says why.
        """
        images, masks = open_images(image), to_masks(mask)
        rows = _rows(num_images, image=images, mask=masks, class_label=label_list(class_labels))
        return self._inpaint(
            images, masks, rows, class_labels, keeping=keeping, max_unknown=max_unknown,
            jumps=jumps, jump_scales=jump_scales, paste=paste, seam_px=seam_px, **options,
        )  # fmt: skip

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
        **options: Any,
    ) -> NextScalePipelineOutput:
        """Make what lies beyond the edges: the picture with margins of so many of its pixels, at the model's size.

        Whatever the rule of keeping, what is read of a margin is painted from the picture: there is no original.

        Args:
            image: what to extend.
            left: pixels to add at the left,
            top: at the top,
            right: at the right,
            bottom: and below.
            class_labels: what the whole image is to be; None asks for no class.
            num_images: results, where images and labels are single ones.
            options: those of `inpaint`, and of a call.

        Raises:
            UserError: an image, a margin or an option is not usable.
        """
        images = open_images(image)
        rows = _rows(num_images, image=images, class_label=label_list(class_labels))
        stride, device = self.image_tokenizer.stride, self.device
        larger, masks = zip(
            *(extended(one.to(device), stride, left, top, right, bottom) for one in images), strict=True
        )
        return self._inpaint(larger, masks, rows, class_labels, **options)

    def edit_class(
        self, image: ImageInput, mask: MaskInput, class_labels: Labels, **options: Any
    ) -> NextScalePipelineOutput:
        """Make the pixels under the mask anew, as part of an image of another class.

        Arguments and errors are those of `inpaint`, but for the labels, which have to be classes.
        """
        if any(label is None for label in label_list(class_labels)):
            raise UserError("edit_class needs a class for every image, got None. Use inpaint for edits without one.")
        return self.inpaint(image, mask, class_labels, **options)

    def super_resolve(
        self,
        image: ImageInput,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        from_scale: int | None = None,
        max_unknown: float | Sequence[float] | None = None,
        paste: bool = True,
        **options: Any,
    ) -> NextScalePipelineOutput:
        """A small image at the model's size: it says what the coarse scales are, and the finer ones are drawn.

        Args:
            image: smaller than the model's images.
            class_labels: what it shows; None asks for no class.
            num_images: results, where images and labels are single ones.
            from_scale: the first scale (from 0) that is drawn; None is the first whose tokens are finer than the small
                image can tell.
            max_unknown: as for `inpaint`, beside the shorter side of a picture that is no square.
            paste: mend the result so that, averaged to the small image's size, it is the small image.
            options: those of a call.

        Raises:
            UserError: an image is not smaller than the model's, or smaller than the stride, or an option is not usable.
        """
        images, side, stride = open_images(image), self.image_size, self.image_tokenizer.stride
        rows = _rows(num_images, image=images, class_label=label_list(class_labels))
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
        request = self._edit_request(rows, class_labels, **options)
        canvas.check_output_type(request.output_type)
        known = self._known(canvas.pixels, canvas.mask, rows, max_unknown=max_unknown, from_scale=from_scale)
        edited = self._edited(known, request)
        if request.output_type == "latent":
            return edited.output(edited.features)
        # the arithmetic of pixels is fp32, whatever the type of the weights
        made = self._decode(edited.features).float()
        if paste:
            for one, small, box in zip(made, _spread(images, rows), _spread(canvas.boxes, rows), strict=True):
                left, top, right, bottom = box
                picture = one[None, :, top:bottom, left:right]
                one[:, top:bottom, left:right] = project_onto_small(picture, small)[0]
        return edited.output(canvas.cut(made, request.output_type))

    def variations(
        self,
        image: ImageInput,
        from_scale: int,
        class_labels: Labels = None,
        *,
        num_images: SupportsIndex | None = None,
        **options: Any,
    ) -> NextScalePipelineOutput:
        """Images that share the scales before `from_scale` with `image`, which is resized and cropped as by `encode`.

        Args:
            image: what to vary.
            from_scale: first scale (from 0) that is drawn; 0 keeps nothing, the number of scales everything.
            class_labels: what the images are to be; None asks for no class.
            num_images: variations, where images and labels are single ones.
            options: those of a call.

        Raises:
            UserError: there are fewer scales, an image is smaller than the stride, or another argument is not usable.
        """
        images = to_images(image, self.image_size, stride=self.image_tokenizer.stride).to(self.device)
        rows = _rows(num_images, image=list(images), class_label=label_list(class_labels))
        request = self._edit_request(rows, class_labels, **options)
        known = self._known(images, torch.zeros_like(images[:, :1]), rows, from_scale=from_scale)
        edited = self._edited(known, request)
        if request.output_type == "latent":
            return edited.output(edited.features)
        return edited.output(as_output(self._decode(edited.features), request.output_type))

    def _inpaint(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        rows: int,
        class_labels: Labels,
        *,
        keeping: Keeping = "coverage",
        max_unknown: float | Sequence[float] | None = None,
        jumps: int | Sequence[int] = 0,
        jump_scales: int | None = None,
        paste: bool = True,
        seam_px: int | None = None,
        **options: Any,
    ) -> NextScalePipelineOutput:
        request = self._edit_request(rows, class_labels, **options)
        back = Jumps.of(jumps, jump_scales, self.schedule.num_scales)
        if seam_px is not None and not paste:
            raise UserError(f"seam_px blends the pasted pixels, got {seam_px} with paste=False. Leave it out.")
        seam_px = max(1, self.image_size // _SEAM_PARTS) if seam_px is None else seam_px
        if not 0 <= seam_px <= self.image_size:
            raise UserError(f"seam_px must lie in 0..{self.image_size} (pixels), got {seam_px}. 0 is a sharp seam.")
        # one image and one mask are placed and encoded once, however many results they serve
        sources = max(len(images), len(masks))
        images, masks = ([one.to(self.device) for one in _spread(given, sources)] for given in (images, masks))
        canvas: Canvas = place(
            images, masks, self.image_size, stride=self.image_tokenizer.stride, hide=keeping != "published"
        )
        canvas.check_output_type(request.output_type)
        known = self._known(canvas.pixels, canvas.mask, rows, keeping=keeping, max_unknown=max_unknown)
        edited = self._edited(known, request, back)
        if request.output_type == "latent":
            return edited.output(edited.features)
        # the arithmetic of pixels is fp32, whatever the type of the weights
        made = self._decode(edited.features).float()
        if paste:
            made = canvas.pasted(made, seam_px)
        return edited.output(canvas.cut(made, request.output_type))

    def _known(self, pixels: Images, mask: Tensor, rows: int, **rule: Any) -> KnownPart:
        return known_part(self.image_tokenizer, self.schedule, pixels, mask, num_results=rows, **rule)

    def _edited(self, known: KnownPart, request: Request, jumps: Jumps | None = None) -> "_Edited":
        sampler = self._sampler(request, EDIT_STREAMS)
        token_ids, features = [torch.empty(0)] * self.schedule.num_scales, None
        for scale in edit_scales(self.image_tokenizer, sampler, known, jumps):
            # a jump draws a scale once more: the last draw counts
            token_ids[scale.index], features = scale.token_ids.cpu(), scale.features
        assert features is not None, "there is at least one scale"
        return _Edited(features, token_ids, sampler.num_forwards, request)

    def _edit_request(
        self,
        num_images: int,
        class_labels: Labels,
        *,
        guidance_scale: Guidance | Default = FOLDER_DEFAULT,
        top_k: int | None | Default = FOLDER_DEFAULT,
        top_p: float | int | None | Default = FOLDER_DEFAULT,
        temperature: float | int | Default = FOLDER_DEFAULT,
        smooth: bool | Default = FOLDER_DEFAULT,
        seed: Whole | None = None,
        generator: Generators = None,
        image_index: Whole = 0,
        output_type: OutputType = "pil",
    ) -> Request:
        return self._request(
            class_labels, num_images, 1, seed, generator, image_index, output_type,
            guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, temperature=temperature, smooth=smooth,
        )  # fmt: skip


def _rows(num_images: SupportsIndex | None, **given: Sequence[Any]) -> int:
    """Number of results: that of the longest input, or `num_images`; single inputs serve all.

    Raises:
        UserError: two inputs have different numbers, neither being 1.
    """
    rows = max(map(len, given.values())) if num_images is None else whole_number(num_images, "num_images")
    if rows < 1:
        raise UserError(f"at least one image is needed, got num_images={num_images}.")
    for name, values in given.items():
        if len(values) not in (1, rows):
            raise UserError(f"an edit of {rows} image(s) takes one {name} or {rows}, got {len(values)}.")
    return rows


def _spread(values: Sequence[_Value], rows: int) -> list[_Value]:
    return list(values) * rows if len(values) == 1 else list(values)


@dataclass(frozen=True)
class _Edited:
    """What an edit drew, before it becomes pictures."""

    features: LatentMap
    token_ids: list[Tensor]
    num_forwards: int
    request: Request

    def output(self, images: Pictures) -> NextScalePipelineOutput:
        request = self.request
        return NextScalePipelineOutput(images, self.token_ids, request.class_labels, request.seeds, self.num_forwards)
