"""Options of `isthmus study`, and what they resolve to. This file imports nothing heavy: the command line is derived
from it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from isthmus.dar.runs import (
    DiffusionTokenizerRun,
    NextTokenPriorRun,
    diffusion_tokenizer_preset,
    next_token_prior_preset,
)
from isthmus.errors import UserError
from isthmus.next_scale.runs import DistillRun, PriorRun, TokenizerRun, distill_preset, prior_preset, tokenizer_preset

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


DAR_BUDGETS = {
    # few samples for guidance: the table costs a minute and a half beside the trainings
    "quick": Budget(
        tables=("reconstruction", "solvers", "guidance", "order"), num=100, tokenizer_steps=0.75, prior_steps=0.5
    ),
    "full": Budget(tables=("reconstruction", "previews", "solvers", "guidance", "order"), num=529),
}

SOLVERS = ("euler", "adams-bashforth", "adams-bashforth-variable")


@dataclass(frozen=True, kw_only=True)
class DarStudyOptions(StudyOptions):
    """Reconstruction by number of tokens, previews, solvers, guidance schedules and the order of the tokens of D-AR.

    quick trains one shortened tokenizer and prior and fills some tables; full trains three of each and fills all. The
    same command goes on where it was stopped.
    """

    preset_tokenizer: str = "dar-small-32"
    """Preset of the tokenizer (`isthmus info presets`); bigger ones are for GPUs."""
    preset_prior: str = "dar-prior-small"
    """Preset of the prior."""


@dataclass(frozen=True, kw_only=True)
class DarSetting:
    """Everything that decides the results of a study.

    Attributes:
        tokenizer: the run of all tokenizers; the study fills in the seed and where it goes.
        prior: the run of all priors.
        seeds: of the trainings of tokenizer and prior, and of the samples drawn from them.
        num: samples per model and setting.
        guidances: measured beside the prior's own: off, the paper's constant and its linear schedule.
        solvers: rules of a solver step.
        solver_steps: how many of them.
        batch_size: images drawn at once; None estimates what fits.
        device: where networks run.
        threads: of torch on the CPU, for what is timed.
    """

    tokenizer: DiffusionTokenizerRun
    prior: NextTokenPriorRun
    seeds: tuple[int, ...]
    num: int
    guidances: tuple[str, ...] = ("1", "1.5", "linear:1.1:8")
    solvers: tuple[str, ...] = SOLVERS
    solver_steps: tuple[int, ...] = (4, 8, 16)
    batch_size: int | None = None
    device: str = "cpu"
    threads: int = 1


def dar_setting(options: DarStudyOptions, device: str, threads: int) -> DarSetting:
    """What the options resolve to. Raises `UserError` for unknown presets."""
    budget, chosen = DAR_BUDGETS[options.budget], {"data": options.data, "classes": options.chosen_classes}
    tokenizer = diffusion_tokenizer_preset(options.preset_tokenizer)
    prior = next_token_prior_preset(options.preset_prior)
    return DarSetting(
        tokenizer=replace(
            tokenizer,
            num_steps=round(tokenizer.num_steps * budget.tokenizer_steps),
            continuous_steps=round(tokenizer.continuous_steps * budget.tokenizer_steps),
            **chosen,
        ),
        prior=replace(prior, num_steps=round(prior.num_steps * budget.prior_steps), **chosen),
        seeds=tuple(range(options.num_seeds)),
        num=options.num or budget.num,
        batch_size=options.batch_size,
        device=device,
        threads=threads,
    )


# the prior of the comparisons is trained longer where there is time: short trainings favour no side for sure
SRDD_BUDGETS = {
    # three trainings are four fifths of its quarter of an hour
    "quick": Budget(tables=("masks", "guidance", "snr"), num=500, tokenizer_steps=0.75, prior_steps=2 / 3),
    "full": Budget(
        tables=("masks", "guidance", "schedules", "weighting", "snr", "refinement", "distillation", "editing"),
        # n of the reference: with three seeds, their spread says more than a second chunk of each
        num=529,
        prior_steps=1.5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SrddStudyOptions(StudyOptions):
    """Masks, guidance, scale schedules, loss weights, signal-to-noise ratio, refinement, distillation and editing.

    Every comparison has equal data, parameters, steps and seeds. quick trains one seed and fills some tables; full
    trains three and fills all. The same command goes on where it was stopped.
    """

    preset_tokenizer: str = "small-32"
    """Preset of the tokenizer (`isthmus info presets`); bigger ones are for GPUs."""
    preset_prior: str = "srdd-small"
    """Preset of the prior; its mask and its loss weights are what the study varies."""
    preset_student: str = "distill-small"
    """Preset of the students that learn a shorter schedule."""


@dataclass(frozen=True, kw_only=True)
class SrddSetting:
    """Everything that decides the results of a study.

    Attributes:
        tokenizer: its run; the study fills in where it goes.
        prior: the run that all priors share; the study varies mask, scales, loss weights and seed.
        student: the run that all students share; the study fills in teacher, scales and seed.
        seeds: of the priors' trainings, and of the samples drawn from them.
        num: samples per model and guidance.
        guidances: constant ones that are swept; the prior's own is measured beside them.
        refinement_probability: of the prior that is trained for refinement.
        jumps: in edits, each measured.
        rounds: of timing.
        batch_size: images drawn at once; None estimates what fits.
        device: where networks run.
        threads: of torch on the CPU, for what is timed.
    """

    tokenizer: TokenizerRun
    prior: PriorRun
    student: DistillRun
    seeds: tuple[int, ...]
    num: int
    guidances: tuple[str, ...] = ("1", "1.5", "2", "3", "5")
    refinement_probability: float = 0.5
    jumps: tuple[int, ...] = (0, 1)
    rounds: int = 9
    batch_size: int | None = None
    device: str = "cpu"
    threads: int = 1


def srdd_setting(options: SrddStudyOptions, device: str, threads: int) -> SrddSetting:
    """What the options resolve to. Raises `UserError` for unknown presets."""
    budget, chosen = SRDD_BUDGETS[options.budget], {"data": options.data, "classes": options.chosen_classes}
    tokenizer, prior = tokenizer_preset(options.preset_tokenizer), prior_preset(options.preset_prior)
    # a student sees the images that its teacher saw, and draws as it does
    same = {"num_views": prior.num_views, "augment": prior.augment, "sampling": prior.sampling}
    # the student without a teacher is an experiment of its own
    same["baseline"] = False
    return SrddSetting(
        tokenizer=replace(tokenizer, num_steps=round(tokenizer.num_steps * budget.tokenizer_steps), **chosen),
        prior=replace(
            prior,
            num_steps=round(prior.num_steps * budget.prior_steps),
            validate_every=max(round(prior.validate_every * budget.prior_steps), 1),
            scale_loss="token-uniform",
            **chosen,
        ),
        student=replace(distill_preset(options.preset_student), **same, **chosen),
        seeds=tuple(range(options.num_seeds)),
        num=options.num or budget.num,
        batch_size=options.batch_size,
        device=device,
        threads=threads,
    )
