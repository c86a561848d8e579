"""Images to tokens and back: the half of a D-AR pipeline that needs no prior."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from isthmus.errors import UserError
from isthmus.functional.shapes import Images
from isthmus.generation.flow_decoding import SolverPlan, decode_tokens, image_noise
from isthmus.generation.step import Pictures
from isthmus.models.diffusion_tokenizer import DiffusionTokenizer
from isthmus.models.flow_decoder import FlowDecoder
from isthmus.pipelines.images import ImageInput, to_images
from isthmus.pipelines.request import OutputType, as_output, check_output_type
from isthmus.pipelines.saved import SavedPipeline
from isthmus.pipelines.seeds import Whole, image_seeds
from isthmus.pipelines.steering import TokenInput, encode_images, to_token_ids
from isthmus.schedulers.flow_matching import FlowMatchingScheduler, Solver


class PixelPipeline(SavedPipeline):
    """What an image tokenizer, its pixel decoder and a scheduler do together; a family's pipeline adds the prior."""

    image_tokenizer: DiffusionTokenizer
    decoder: FlowDecoder
    scheduler: FlowMatchingScheduler

    @property
    def image_size(self) -> int:
        """Side of the images trained on, in pixels."""
        return self.image_tokenizer.config["image_size"]

    def encode(self, images: ImageInput) -> Int[Tensor, "b n"]:
        """All tokens of images, coarse to fine, on the CPU.

        Raises:
            UserError: the images are not usable, or have sides that the tokenizer's patch does not divide.
        """
        return encode_images(self.image_tokenizer, images)

    def decode(
        self,
        token_ids: TokenInput,
        *,
        num_inference_steps: int | None = None,
        solver: Solver | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: Whole | None = 0,
        image_index: Whole = 0,
        output_type: OutputType = "pil",
    ) -> Pictures:
        """Images from tokens that all exist: the diffusion alone. Arguments as for a call.

        Raises:
            UserError: the tokens are too few, too many or name no codes, or an argument is not usable.
        """
        check_output_type(output_type)
        token_ids = to_token_ids(self.image_tokenizer, token_ids)
        plan = SolverPlan.of(self.scheduler, num_inference_steps=num_inference_steps, solver=solver)
        seeds = image_seeds(len(token_ids), seed=seed, image_index=image_index)
        noise = image_noise(seeds, *checked_sides(self.decoder, self.image_size, height, width))
        return self._decoded(token_ids, noise, plan, output_type)

    def reconstruct(self, images: ImageInput, **options: Any) -> Pictures:
        """Images through their own tokens and back; `options` are those of `decode`. Tensors keep their size."""
        pixels = to_images(images, self.image_size)
        options = {"height": pixels.shape[2], "width": pixels.shape[3], **options}
        return self.decode(self.encode(pixels), **options)

    def restart(
        self,
        image: ImageInput,
        strength: float | int,
        *,
        token_ids: TokenInput | None = None,
        num_inference_steps: int | None = None,
        solver: Solver | None = None,
        seed: Whole | None = 0,
        image_index: Whole = 0,
        output_type: OutputType = "pil",
    ) -> Pictures:
        """Run the last solver steps again, from `image` with the noise of the first of them.

        Args:
            image: where the diffusion starts.
            strength: share of the steps that run, in (0, 1]: small changes little, 1 starts from noise alone.
            token_ids: what drives the steps: tokens of the images, or of others drawn with their layout; None takes
                those of `image`.
            num_inference_steps: steps of the whole way.
            solver: as for a call; the first step that runs is one of Euler.
            seed: as for a call.
            image_index: as for a call.
            output_type: as for a call.

        Raises:
            UserError: an argument is not usable.
        """
        check_output_type(output_type)
        pixels = to_images(image, self.image_size)
        token_ids = self.encode(pixels) if token_ids is None else to_token_ids(self.image_tokenizer, token_ids)
        rows = len(token_ids)
        if len(pixels) not in (1, rows):
            raise UserError(f"a restart needs one image, or one per row of tokens ({rows}), got {len(pixels)}.")
        times = self.scheduler.times(num_inference_steps)
        first = first_step(strength, len(times) - 1)
        plan = SolverPlan.of(self.scheduler, num_inference_steps=num_inference_steps, solver=solver, first=first)
        seeds = image_seeds(rows, seed=seed, image_index=image_index)
        sides = checked_sides(self.decoder, self.image_size, pixels.shape[2], pixels.shape[3])
        noise, images = image_noise(seeds, *sides), pixels.expand(rows, -1, -1, -1)
        x = self.scheduler.add_noise(images, noise, times[first].expand(rows))
        return self._decoded(token_ids, x, plan, output_type)

    def _decoded(self, token_ids: Int[Tensor, "b n"], x: Images, plan: SolverPlan, output_type: OutputType) -> Pictures:
        images = decode_tokens(self.image_tokenizer, self.decoder, self.scheduler, token_ids, x, plan=plan)
        return as_output(images, output_type)


def checked_sides(decoder: FlowDecoder, image_size: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of the images to make; None is `image_size`.

    Raises:
        UserError: a side is no multiple of the decoder's patch, or the decoder knows one size only.
    """
    patch, grid = decoder.config["patch_size"], decoder.config["position_table"]
    sides = (image_size if height is None else height, image_size if width is None else width)
    if any(side < 1 or side % patch for side in sides):
        raise UserError(f"height and width must be multiples of {patch} (the decoder's patch_size), got {sides}.")
    if grid is not None and sides != (grid * patch, grid * patch):
        raise UserError(
            f"this decoder has learned a position for every patch: height and width must be {grid * patch}, got "
            f"{sides}. Leave them out."
        )
    return sides


def first_step(strength: float, num_steps: int) -> int:
    """The solver step at which a restart begins: strength 1 runs all steps, a small one the last alone.

    Raises:
        UserError: strength is not in (0, 1].

    >>> [first_step(strength, 8) for strength in (1.0, 0.5, 0.01)]
    [0, 4, 7]
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is the share of the solver steps that run, in (0, 1], got {strength}.")
    return min(round((1 - strength) * num_steps), num_steps - 1)
