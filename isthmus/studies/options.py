"""Options that both studies share. This file imports nothing heavy: the command line is derived from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from isthmus.errors import UserError

BALANCE: Literal["data"] = "data"
"""Classes of samples: as often as in the data, whose mix the reference has. Another would be part of every distance."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Scripted experiments at equal data, parameters, steps and seeds, with a report. The same command goes on."""

    budget: Literal["quick", "full"] = "quick"
    """quick: some of the tables, in 15 minutes or less on two cores; full: all, in one hour (dar) to three (srdd)."""
    seeds: int | None = None
    """Trainings of every model, with seeds 0, 1, ...; None is 1 for quick and 3 for full."""
    out: Path | None = None
    """Folder of everything; None is named after the study and the budget."""
    tables: tuple[str, ...] = ()
    """Tables to fill, by name; none given: those of the budget."""
    data: str = "openmoji"
    """As for `isthmus train`: openmoji, photos, folder:PATH, npz:PATH or hf:NAME[:SPLIT]."""
    classes: tuple[str, ...] = ("face", "flag", "hand", "person")
    """Classes of the data set, or `all`."""
    num: int | None = None
    """Samples per model and setting; None is the budget's."""
    batch_size: int | None = None
    """Images drawn at once; None estimates what fits into memory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where everything runs."""
    threads: int | None = None
    """Threads of torch on the CPU; None leaves its default."""

    def __post_init__(self):
        for name in ("seeds", "num", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.num is not None and self.num < 2:
            raise UserError(f"--num must be at least 2 (a distance compares sets), got {self.num}.")
        if not self.classes:
            raise UserError("--classes needs names of classes, or all, got none.")

    @property
    def num_seeds(self) -> int:
        """Trainings of every model."""
        return self.seeds or (1 if self.budget == "quick" else 3)

    @property
    def chosen_classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None is all of them."""
        return None if tuple(self.classes) == ("all",) else tuple(self.classes)


@dataclass(frozen=True)
class Budget:
    """What a budget buys.

    Attributes:
        tables: names of the tables it fills.
        num: samples per model and setting.
        tokenizer_steps: of the tokenizer preset's steps, this share is trained.
        prior_steps: the same of the prior's.
    """

    tables: tuple[str, ...]
    num: int
    tokenizer_steps: float = 1.0
    prior_steps: float = 1.0


def study_folder(options: StudyOptions, name: str) -> Path:
    """Where everything goes.

    >>> str(study_folder(StudyOptions(), "srdd")), str(study_folder(StudyOptions(budget="full"), "srdd"))
    ('study-srdd', 'study-srdd-full')
    """
    if options.out is not None:
        return options.out
    return Path(f"study-{name}" + ("-full" if options.budget == "full" else ""))


def chosen_tables(asked: tuple[str, ...], of_budget: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Tables to fill, in the order of the report.

    Raises:
        UserError: one is unknown.

    >>> chosen_tables(("b", "a"), ("c",), ("a", "b", "c")), chosen_tables((), ("c",), ("a", "b", "c"))
    (('a', 'b'), ('c',))
    """
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f"--tables takes names of {', '.join(known)}, got {unknown[0]}.")
    return tuple(name for name in known if name in (asked or of_budget))
