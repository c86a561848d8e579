"""`isthmus evaluate` and `isthmus compare`: scores of a model or of anyone's images, and one table of several
evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from isthmus.cli.options import SteeredDrawOptions, parse
from isthmus.errors import UserError
from isthmus.nn.guidance import Guidance
from isthmus.pipelines.options import parse_guidance

# what says how a model draws: nothing to images that exist
_DRAWING = ("seed", "guidance", "top_k", "top_p", "temperature", "smooth", "steps", "solver", "batch_size", "dtype")


@dataclass(frozen=True, kw_only=True)
class Evaluate(SteeredDrawOptions):
    """Score MODEL on a data set, or --samples against --reference. Run again to go on; a finished one is not redone."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """A pipeline folder or a hub id; nothing with --samples."""
    out: Path
    """Folder for samples, evaluation.json, report.md and report.html."""
    data: str | None = None
    """avatars[:STYLE,...], emoji, openmoji, photos, folder:PATH, npz:PATH or hf:NAME: the model's images; the held-out
    part judges it."""
    classes: tuple[str, ...] = ()
    """Classes of the data; none are those of the model."""
    image_column: str | None = None
    """hf: data only: column of the images; None is the first that holds images."""
    label_column: str | None = None
    """hf: data only: column of the classes, texts or whole numbers; none reads no labels."""
    caption_column: str | None = None
    """hf: data only: column of the captions, which are texts; None reads none."""
    max_images: int | None = None
    """avatars only: drawings that the model was trained on, over all styles; None is 20000."""
    num: int = 2000
    """N, how many images are drawn."""
    samples: Path | None = None
    """Score these images instead of a model's: an .npz with arr_0, or a folder, with or without npz: or folder:."""
    reference: Path | None = None
    """Measure against these: an .npz (arr_0, or mu and sigma) or a folder, likewise; None takes images of the data."""
    features: str = "lite0"
    """lite0, inception:FILE_OF_WEIGHTS or dinov2:FOLDER_OR_HUB_ID."""
    balance: Literal["uniform", "data"] = "uniform"
    """Draw every class equally often, or as often as it is in the data."""
    attributes: tuple[str, ...] = ()
    """Attributes of avatars that are looked for in the samples, such as eyes,"body colour": all, none, or some. Without
    it all of them are for models that read text, none for others."""
    sweep_guidance: tuple[str, ...] = ()
    """Guidances to draw and score beside, such as 1,1.5,2,3."""
    lpips_weights: tuple[Path, ...] = ()
    """Measure LPIPS of reconstructions too, with VGG16 and LPIPS weights from these files."""
    solver_steps: tuple[int, ...] = ()
    """Also rebuild held-out images of a D-AR model with these numbers of solver steps, such as 4,8,16."""
    npz: bool = False
    """Also write samples.npz, which ADM's evaluator reads."""
    statistics: bool = False
    """Also write statistics.npz: mu and sigma of the samples in the first feature space, for --reference."""

    def __post_init__(self):
        super().__post_init__()
        if self.num < 2:
            raise UserError(f"--num must be at least 2, got {self.num}.")
        if (self.model is None) == (self.samples is None):
            raise UserError("a model or --samples is scored, got both or neither. Pass one of them.")
        if self.model is not None and self.data is None:
            raise UserError("a model needs the data it is judged on, got no --data. For example --data openmoji.")
        if self.samples is not None:
            defaults = Evaluate.__dataclass_fields__
            meant = (
                *_DRAWING,
                "num",
                "balance",
                "attributes",
                "sweep_guidance",
                "lpips_weights",
                "solver_steps",
                "npz",
            )
            given = [name for name in meant if getattr(self, name) != defaults[name].default]
            if given:
                option = "--" + given[0].replace("_", "-")
                raise UserError(f"{option} says how a model draws, but --samples are drawn already. Leave it out.")
            if self.data is None and self.reference is None:
                raise UserError("--samples are measured against something, got no --reference and no --data. Pass one.")
            if self.data is None and self.classes:
                raise UserError("--classes names classes of the data, got no --data. Pass --data, or leave it out.")
            if self.data is None and (self.image_column or self.label_column or self.caption_column):
                raise UserError(
                    "--image-column, --caption-column and --label-column are columns of the data, got no --data. Pass "
                    "--data hf:NAME, or leave them out."
                )
            if self.data is None and self.max_images is not None:
                raise UserError("--max-images is a number of avatars, got no --data. Pass --data, or leave it out.")

    def sweep(self) -> list[Guidance]:
        """The guidances of the sweep; UserError where one cannot be read or is given twice."""
        found = [parse_guidance(text) for text in self.sweep_guidance]
        twice = [text for i, text in enumerate(self.sweep_guidance) if found[i] in found[:i]]
        if twice:
            raise UserError(f"--sweep-guidance needs different values, got {twice[0]} twice.")
        return found


def run(arguments: Sequence[str]) -> None:
    """Score and report."""
    command = parse(Evaluate, arguments, prog="isthmus evaluate")
    draw, sweep = command.draw(), command.sweep()  # what cannot be read is refused before the slow imports
    from isthmus.data.source import WantedColumns
    from isthmus.evaluation.evaluate import evaluate_images, evaluate_model
    from isthmus.evaluation.held_out import Measures

    names = ("data", "classes", "max_images", "reference", "features", "statistics")
    shared = {name: getattr(command, name) for name in names}
    shared["columns"] = WantedColumns(command.image_column, command.label_column, command.caption_column)
    if command.samples is not None:
        evaluate_images(command.samples, command.out, device=command.device, **shared)
        return
    assert command.model is not None, "checked with the options"
    evaluate_model(
        command.model,
        command.out,
        num=command.num,
        steering=command.steering(),
        balance=command.balance,
        attributes=command.attributes,
        sweep=sweep,
        npz=command.npz,
        measures=Measures(lpips_weights=command.lpips_weights, solver_steps=command.solver_steps),
        **shared,
        **draw,
    )


@dataclass(frozen=True, kw_only=True)
class Compare:
    """One table of evaluations; refused where they were not measured in the same way."""

    evaluations: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folders that `isthmus evaluate` wrote."""
    out: Path | None = None
    """Also write the table to this file (Markdown)."""

    def __post_init__(self):
        if len(self.evaluations) < 2:
            raise UserError(f"a comparison needs at least two evaluations, got {len(self.evaluations)}.")


def run_compare(arguments: Sequence[str]) -> None:
    """Print, and write where asked."""
    command = parse(Compare, arguments, prog="isthmus compare")
    from isthmus.evaluation.report import compare
    from isthmus.files import write_whole

    text = compare(command.evaluations)
    print(text, end="")
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(command.out, text)
