"""Options of `isthmus study srdd`, and what they resolve to. This file imports nothing heavy."""

from dataclasses import dataclass, replace

from isthmus.presets import distill_preset, prior_preset, tokenizer_preset
from isthmus.studies.options import Budget, StudyOptions
from isthmus.training.config import PriorRun, TokenizerRun
from isthmus.training.distill_config import DistillRun

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
