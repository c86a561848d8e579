"""Pixels to latents and features to pixels, with the layout of maps that is fastest on the device."""

import torch

from isthmus.functional.precision import whole_fp32
from isthmus.functional.shapes import Images, LatentMap
from isthmus.layers.convolution import cpu_layout
from isthmus.models.multiscale_vqvae import MultiScaleVQVAE


@torch.no_grad()
@whole_fp32()
def latents_of(image_tokenizer: MultiScaleVQVAE, images: Images) -> LatentMap:
    """Latents of images in [-1, 1], of the tokenizer's size, in fp32 on its device.

    The encoder computes in the type of its weights: with those of a bfloat16 model the latents are others than in
    float32, and so are tokens that lie near the border of two codes.

    Raises:
        UserError: the images have another side than the tokenizer's.
    """
    device, dtype = image_tokenizer.device, image_tokenizer.dtype
    images = images.to(device, dtype).contiguous(memory_format=_layout(image_tokenizer, device))
    return image_tokenizer.latents(images).float().contiguous()


@torch.no_grad()
def pixels_of(image_tokenizer: MultiScaleVQVAE, features: LatentMap) -> Images:
    """Images in [-1, 1] of features, in the type of the weights, on the device of the features."""
    layout = _layout(image_tokenizer, features.device)
    features = features.to(image_tokenizer.dtype).contiguous(memory_format=layout)
    return image_tokenizer.decode_features(features).contiguous()


def _layout(image_tokenizer: MultiScaleVQVAE, device: torch.device) -> torch.memory_format:
    # the weights stay as they are
    on_cpu = cpu_layout(image_tokenizer.dtype, image_tokenizer.image_size)
    return on_cpu if device.type == "cpu" else torch.contiguous_format
