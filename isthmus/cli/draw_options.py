"""How images are drawn, as options of a command: shared by `isthmus sample`, `evaluate` and `edit`."""

from dataclasses import dataclass
from typing import Literal

from isthmus.errors import UserError
from isthmus.functional.guidance import Guidance
from isthmus.generation.options import FOLDER_DEFAULT, Default, parse_guidance


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Options that stand for the model's own where they are not given."""

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
    batch_size: int | None = None
    """Images at once; None estimates what fits into memory."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the weights; auto: bfloat16 where this device computes at least twice as fast in it. In bfloat16 images
    may differ between batch sizes, and images that are read have other tokens."""

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"--seed must not be negative, got {self.seed}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}.")

    def options(self) -> dict[str, Guidance | float | int | bool | None | Default]:
        """The options of the draw that were given; the others stand for the model's own."""
        guidance = FOLDER_DEFAULT if self.guidance == "default" else parse_guidance(self.guidance)
        given = {"top_k": self.top_k, "top_p": self.top_p, "temperature": self.temperature}
        words = {"default": FOLDER_DEFAULT, "off": None}
        filters = {name: words[value] if isinstance(value, str) else value for name, value in given.items()}
        return {"guidance_scale": guidance, **filters, "smooth": self.smooth or FOLDER_DEFAULT}


@dataclass(frozen=True, kw_only=True)
class SteeredDrawOptions(DrawOptions):
    """And those that only some models have."""

    steps: int | None = None
    """Solver steps of a D-AR model; None takes the model's."""
    solver: Literal["default", "euler", "adams-bashforth", "adams-bashforth-variable"] = "default"
    """How a D-AR model goes from step to step."""

    def steering(self) -> dict[str, int | str]:
        """Arguments that only some models have, where they were given."""
        given = {"num_inference_steps": self.steps, "solver": None if self.solver == "default" else self.solver}
        return {name: value for name, value in given.items() if value is not None}
