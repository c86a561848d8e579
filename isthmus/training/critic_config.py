"""Settings of `isthmus train critic`. This file imports nothing heavy: the command line is derived from it."""

from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import UserError
from isthmus.training.config import check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class CriticRun:
    """Training of a `TokenCritic` for one next-scale model."""

    model: str = ""
    """The model it is to judge: a pipeline folder or hub id."""
    data: str | None = None
    """openmoji, photos, folder:PATH, npz:PATH or hf:NAME[:SPLIT]: what the model was trained on. None takes that from
    the model's run.json."""
    out: Path = Path("runs/critic")
    """Folder of the model with its critic; the token cache lies in it, too."""
    classes: tuple[str, ...] | None = None
    """Classes of the data set to use, by name; None takes those of the model's run.json, or all where data is given.
    They must be those of the model."""
    image_column: str | None = None
    """hf: data only: column of the images, as for `isthmus train prior`; None takes the model's where data is not
    given."""
    label_column: str | None = None
    """hf: data only: column of the classes, likewise."""
    seed: int = 0
    """Decides every random choice."""
    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, after a tenth of the steps; it falls to 0 on a cosine."""
    width: int = 64
    """Channels of the critic, a multiple of 8."""
    num_blocks: int = 4
    """Convolutions of the critic."""
    num_views: int = 4
    """Augmented views per image in the token cache."""
    max_held_out: int = 1024
    """Held-out images that it is measured on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self):
        check_positive(self, "num_steps", "batch_size", "learning_rate", "width", "num_blocks", "num_views")
        check_positive(self, "max_held_out")
        check_not_negative(self, "seed")
        if not self.model:
            raise UserError("a critic is trained for a model, got none. Pass its folder.")
