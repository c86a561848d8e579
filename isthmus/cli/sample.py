"""`isthmus sample`: images from a model, each with everything needed to draw it again."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from isthmus.cli.parsing import parse
from isthmus.errors import UserError
from isthmus.functional.guidance import Guidance
from isthmus.generation.options import FOLDER_DEFAULT, Default, parse_guidance

logger = logging.getLogger("isthmus")


def options_of_a_draw(
    guidance: str, top_k: str | int, top_p: str | float, temperature: str | float, smooth: bool
) -> dict[str, Guidance | float | int | bool | None | Default]:
    """Options of a draw from what was typed; `default` stands for the model's own, `off` for none."""
    given = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    words = {"default": FOLDER_DEFAULT, "off": None}
    filters = {name: words[value] if isinstance(value, str) else value for name, value in given.items()}
    guided = FOLDER_DEFAULT if guidance == "default" else parse_guidance(guidance)
    return {"guidance_scale": guided, **filters, "smooth": smooth or FOLDER_DEFAULT}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from a model. Image i is the same whatever the batch size; run again to fill in missing images."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A pipeline folder (a trained run, a converted checkpoint) or a hub id."""
    out: Path
    """Folder for the images, samples.json, grid.png and strip.png."""
    classes: tuple[str, ...] = ()
    """Names or ids, taken in turn; `null` is no class. None given: all classes of the model."""
    num: int = 16
    """Number of images."""
    seed: int = 0
    """Image i is drawn from (seed, i)."""
    guidance: str = "default"
    """A number (1 = off), linear:START:END, cosine:START:END, or one number per step; default: the model's."""
    top_k: Literal["default", "off"] | int = "default"
    """Keep the k likeliest codes."""
    top_p: Literal["default", "off"] | float = "default"
    """Keep the likeliest codes that hold this probability together."""
    temperature: Literal["default"] | float = "default"
    """Divides the logits."""
    smooth: bool = False
    """Mix codes instead of drawing one: softer images."""
    steps: int | None = None
    """Solver steps of a D-AR model; None takes the model's."""
    solver: Literal["default", "euler", "adams-bashforth", "adams-bashforth-variable"] = "default"
    """How a D-AR model goes from step to step."""
    prefix_image: Path | None = None
    """Image whose first tokens every image keeps (layout control of D-AR models)."""
    prefix_tokens: int | None = None
    """How many tokens of --prefix-image are kept: the more, the closer the layout."""
    int8: bool = False
    """Decode with 8-bit weights (D-AR models on a CPU): large priors are faster, a token now and then is another."""
    compile: bool = False
    """Compile the decoding of tokens (D-AR models): pays on GPUs, after a first wait."""
    grid: bool = False
    """Write grid.png: rows are classes, names written."""
    strip: bool = False
    """Write strip.png: the first images as they grow, scale by scale or solver step by solver step."""
    batch_size: int | None = None
    """Images at once; None estimates what fits into memory."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. In bfloat16 images may differ between batch sizes."""

    def __post_init__(self):
        if self.num < 1:
            raise UserError(f"--num must be at least 1, got {self.num}.")
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, got {self.seed}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}.")
        if (self.prefix_image is None) != (self.prefix_tokens is None):
            raise UserError("a layout is kept by --prefix-image FILE and --prefix-tokens M together, got one of them.")
        if self.prefix_image is not None and not self.prefix_image.is_file():
            raise UserError(f"--prefix-image must be an image file, got {self.prefix_image}, which is none.")

    def options(self) -> dict[str, Guidance | float | int | bool | None | Default]:
        """The options of the draw that were given; the others stand for the model's own."""
        return options_of_a_draw(self.guidance, self.top_k, self.top_p, self.temperature, self.smooth)

    def steering(self) -> dict[str, int | str]:
        """Arguments that only some models have, where they were given."""
        given = {
            "num_inference_steps": self.steps,
            "solver": None if self.solver == "default" else self.solver,
            "prefix_tokens": self.prefix_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}

    def decoding(self) -> dict[str, bool]:
        """How tokens are computed, where it was asked for."""
        return {name: True for name, wanted in (("int8", self.int8), ("compiled", self.compile)) if wanted}


def run(arguments: Sequence[str]) -> None:
    """Draw and save."""
    command = parse(Sample, arguments, prog="isthmus sample")
    options = command.options()  # guidance that cannot be read is refused before the slow imports
    # imported here: --help does without
    from isthmus.sampling_run import draw_folder

    draw_folder(
        command.model,
        command.out,
        classes=command.classes,
        num_images=command.num,
        seed=command.seed,
        options=options,
        steering=command.steering(),
        decoding=command.decoding(),
        prefix_image=command.prefix_image,
        grid=command.grid,
        strip=command.strip,
        batch_size=command.batch_size,
        device=command.device,
        dtype=command.dtype,
    )
