"""`isthmus sample`: images from a model, each with everything needed to draw it again."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from isthmus.cli.draw_options import SteeredDrawOptions
from isthmus.cli.parsing import parse
from isthmus.errors import UserError

logger = logging.getLogger("isthmus")


@dataclass(frozen=True, kw_only=True)
class Sample(SteeredDrawOptions):
    """Draw images from a model. Image i is the same whatever the batch size; run again to fill in missing images."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A pipeline folder (a trained run, a converted checkpoint) or a hub id."""
    out: Path
    """Folder for the images, samples.json, grid.png and strip.png."""
    classes: tuple[str, ...] = ()
    """Names or numbers, taken in turn: a name where a class has it, else a number; id:2 and name:2 say which, `null` is
    no class. None given: all classes of the model."""
    num: int = 16
    """Number of images."""
    refine: Literal["default", "none", "simple", "masked"] = "default"
    """Draw some tokens again (next-scale models), with the rounds usual in this mode; default: as the model says."""
    prefix_image: Path | None = None
    """Image whose first tokens every image keeps (layout control of D-AR models)."""
    prefix_tokens: int | None = None
    """How many tokens of --prefix-image are kept: the more, the closer the layout."""
    int8: bool = False
    """Decode with 8-bit weights (D-AR models on a CPU): large priors are faster, a token now and then is another."""
    compile: bool = False
    """Compile what predicts tokens, on a CPU with a C++ compiler: pays on GPUs and for many images, after a first wait.
    One seed is one image among compiled draws; others may differ near a tie."""
    grid: bool = False
    """Write grid.png: rows are classes, names written."""
    strip: bool = False
    """Write strip.png: the first images as they grow, scale by scale or solver step by solver step."""

    def __post_init__(self):
        if self.num < 1:
            raise UserError(f"--num must be at least 1, got {self.num}.")
        super().__post_init__()
        if (self.prefix_image is None) != (self.prefix_tokens is None):
            raise UserError("a layout is kept by --prefix-image FILE and --prefix-tokens M together, got one of them.")
        if self.prefix_image is not None and not self.prefix_image.is_file():
            raise UserError(f"--prefix-image must be an image file, got {self.prefix_image}, which is none.")

    def steering(self) -> dict[str, int | str]:
        """Arguments that only some models have, where they were given."""
        prefix = {} if self.prefix_tokens is None else {"prefix_tokens": self.prefix_tokens}
        return {**super().steering(), **prefix}

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
        refine=None if command.refine == "default" else command.refine,
        prefix_image=command.prefix_image,
        grid=command.grid,
        strip=command.strip,
        batch_size=command.batch_size,
        device=command.device,
        dtype=command.dtype,
    )
