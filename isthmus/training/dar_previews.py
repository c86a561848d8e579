"""What a diffusion tokenizer in training shows: decodes of held-out images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.data.batches import EvaluationImages
from isthmus.functional.shapes import Images
from isthmus.generation.flow_decoding import image_noise
from isthmus.pictures import save_picture, spread, table, to_pil
from isthmus.training.dar_export import TokenizerParts
from isthmus.training.dar_measures import Decode, latents_or_codes
from isthmus.training.tokenizer_with_decoder import canvases

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

    `isthmus.generation.flow_decoding` walks the same way from token ids; while a codebook does not exist yet there are
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
