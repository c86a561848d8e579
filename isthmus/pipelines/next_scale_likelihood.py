"""Images to tokens and back, and how probable a next-scale pipeline finds them."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.pyramid import ScaleSchedule
from isthmus.functional.shapes import TokenPyramid
from isthmus.generation.autoencoding import latents_of, pixels_of
from isthmus.generation.next_scale_likelihood import (
    bits_per_pixel,
    check_token_ids,
    diffusion_bound,
    signal_to_noise,
    token_log_likelihood,
)
from isthmus.generation.step import Pictures
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE
from isthmus.models.next_scale_transformer import NextScaleTransformer
from isthmus.pipelines.free_memory import images_that_fit
from isthmus.pipelines.images import ImageInput, to_images
from isthmus.pipelines.labels import resolve_labels
from isthmus.pipelines.request import Labels, OutputType, as_output, check_output_type, label_list
from isthmus.pipelines.saved import SavedPipeline

_MOST_AT_ONCE = 32  # more images at once are no faster


class NextScaleLikelihood(SavedPipeline):
    """Tokens, likelihood and signal-to-noise ratio of images; `NextScalePipeline` adds the draws.

    Images are PIL pictures (at least as large as the stride, resized and cropped to the model's size), tensors
    (b, 3, h, w) in [-1, 1] of that size, or several of these. So many go through at once as fit into half of the memory
    that is free; results do not depend on it. Tokens and numbers come back on the CPU, pictures as tensors and features
    on the model's device.
    """

    image_tokenizer: MultiScaleVQVAE
    transformer: NextScaleTransformer
    schedule: ScaleSchedule

    def encode(self, images: ImageInput) -> TokenPyramid:
        """Token ids of every scale, one int tensor (b, s_k * s_k) each, coarse to fine, on the CPU.

        The tokenizer computes in the type it was loaded in: in bfloat16 the ids of many images differ from those in
        float32, here and wherever images are read (likelihood, classification, edits).

        Raises:
            UserError: the images are not usable.
        """
        with torch.no_grad():
            token_ids = [self.image_tokenizer.requantize(part, self.schedule) for part in self._latents(images)]
        return [torch.cat(parts).cpu() for parts in zip(*token_ids, strict=True)]

    def decode(self, token_ids: TokenPyramid, *, output_type: OutputType = "pil") -> Pictures:
        """Images from token ids; with the first scales alone, what the image looks like at that state.

        Raises:
            UserError: the token ids have other lengths than this model's scales, or name no codes.
        """
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
        """Images through their own tokens and back; from the first `num_scales` scales only, where that is given.

        Raises:
            UserError: the images are not usable, or there are fewer scales.
        """
        count = self.schedule.num_scales if num_scales is None else num_scales
        if not 1 <= count <= self.schedule.num_scales:
            raise UserError(f"num_scales must lie in 1..{self.schedule.num_scales}, got {num_scales}.")
        return self.decode(self.encode(images)[:count], output_type=output_type)

    def log_prob(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: TokenPyramid | None = None,
    ) -> Float[Tensor, " b"]:
        """Exact log-likelihood, in nats, of the token pyramids of images (or of `token_ids`) under their labels.

        It is that of the model without guidance and filters, at temperature 1.

        Args:
            images: the images, or
            class_labels: names, indices or None (no class), one per image or one for all.
            token_ids: what `encode` returns.

        Raises:
            UserError: images or labels are not usable, or both or neither of images and tokens are given.
        """
        return self._token_nats(images, class_labels, token_ids).sum(dim=1)

    def elbo(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: TokenPyramid | None = None,
    ) -> Float[Tensor, " b"]:
        """The discrete-diffusion bound on `log_prob`, in nats, stepping scale by scale: the two are equal."""
        return self._by_parts(
            images, class_labels, token_ids,
            lambda part, labels: diffusion_bound(self.image_tokenizer, self.transformer, part, labels).elbo,
        )  # fmt: skip

    def bits_per_token(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: TokenPyramid | None = None,
    ) -> Float[Tensor, "b n"]:
        """Bits that every token costs, all scales one after the other; arguments as for `log_prob`."""
        return -self._token_nats(images, class_labels, token_ids) / math.log(2)

    def bits_per_pixel(
        self,
        images: ImageInput | None = None,
        class_labels: Labels = None,
        *,
        token_ids: TokenPyramid | None = None,
    ) -> Float[Tensor, " b"]:
        """Bits of the token pyramid over the number of pixels; arguments as for `log_prob`."""
        return bits_per_pixel(self.log_prob(images, class_labels, token_ids=token_ids), self.image_size)

    def signal_to_noise(self, images: ImageInput) -> Float[Tensor, " scales"]:
        """Mean over images of ||f||^2 / ||f - Fhat_n||^2 in dB, after every scale.

        Raises:
            UserError: the images are not usable.
        """
        rows = [signal_to_noise(self.image_tokenizer, part, self.schedule) for part in self._latents(images)]
        return torch.cat(rows).mean(dim=0).cpu()

    def _latents(self, images: ImageInput) -> list[Tensor]:
        """Maps (b, d, grid, grid) of a few images each."""
        given = to_images(images, self.image_size, stride=self.image_tokenizer.stride)
        return [latents_of(self.image_tokenizer, part) for part in given.split(self._images_at_once())]

    def _images_at_once(self) -> int:
        """How many images fit, whatever is done with them: pixels, a draw, or all tokens in one teacher-forced pass."""
        config, size = self.transformer.config, self.transformer.dtype.itemsize
        block = config["width"] * (10 + 2 * config["mlp_ratio"]) * size
        # logits in the type of the weights, in fp32, and what the cross-entropy makes of them
        read = self.schedule.num_tokens * (block + 4 * config["codebook_size"] * 4)
        each = max(int(read), self.bytes_per_image(guided=False))
        return min(_MOST_AT_ONCE, images_that_fit(self.device, each))

    def _token_nats(
        self, images: ImageInput | None, class_labels: Labels, token_ids: TokenPyramid | None
    ) -> Float[Tensor, "b n"]:
        return self._by_parts(
            images, class_labels, token_ids,
            lambda part, labels: token_log_likelihood(self.image_tokenizer, self.transformer, part, labels),
        )  # fmt: skip

    def _by_parts(
        self,
        images: ImageInput | None,
        class_labels: Labels,
        token_ids: TokenPyramid | None,
        measure: Callable[[TokenPyramid, Int[Tensor, " b"]], Tensor],
    ) -> Tensor:
        """`measure` of a few images at a time, on the CPU."""
        if (images is None) == (token_ids is None):
            raise UserError("a likelihood is that of images or of token_ids, got both or neither. Pass one of them.")
        given = label_list(class_labels)
        ids = resolve_labels(given, class_names=self.class_names, num_classes=self.num_classes)
        if token_ids is None:
            assert images is not None
            token_ids = self.encode(images)
        check_token_ids(token_ids, self.schedule.lengths, self.codebook_size)
        labels = torch.tensor(ids * len(token_ids[0]) if len(ids) == 1 else ids)
        if len(labels) != len(token_ids[0]):
            raise UserError(
                f"a likelihood needs one class label, or one per image ({len(token_ids[0])}), got {len(labels)}."
            )
        at_once = self._images_at_once()
        parts = zip(_parts(token_ids, at_once), labels.split(at_once), strict=True)
        return torch.cat([measure(part, each).cpu() for part, each in parts])


def _parts(token_ids: TokenPyramid, at_once: int) -> list[list[Tensor]]:
    """The same pyramids, a few at a time."""
    return [list(part) for part in zip(*(ids.split(at_once) for ids in token_ids), strict=True)]
