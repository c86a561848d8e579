"""Options of `isthmus study srdd`, and what they resolve to. This file imports nothing heavy."""

from dataclasses import dataclass, replace

from isthmus.presets import prior_preset, tokenizer_preset
from isthmus.studies.options import Budget, StudyOptions
from isthmus.training.config import PriorRun, TokenizerRun

# the prior of the comparisons is trained longer where there is time: short trainings favour no side for sure
SRDD_BUDGETS = {
    "quick": Budget(tables=("masks", "guidance", "snr"), num=500),
    "full": Budget(tables=("masks", "guidance", "schedules", "weighting", "snr"), num=1058, prior_steps=1.5),
}


@dataclass(frozen=True, kw_only=True)
class SrddStudyOptions(StudyOptions):
    """Causal against Markov masks, guidance, scale schedules, loss weights and the signal-to-noise ratio per scale.

    Every comparison has equal data, parameters, steps and seeds. quick trains one seed and fills some tables; full
    trains three and fills all. The same command goes on where it was stopped.
    """

    preset_tokenizer: str = "small-32"
    """Preset of the tokenizer (`isthmus info presets`); bigger ones are for GPUs."""
    preset_prior: str = "srdd-small"
    """Preset of the prior; its mask and its loss weights are what the study varies."""


@dataclass(frozen=True, kw_only=True)
class SrddSetting:
    """Everything that decides the results of a study.

    Attributes:
        tokenizer: its run; the study fills in where it goes.
        prior: the run that all priors share; the study varies mask, scales, loss weights and seed.
        seeds: of the priors' trainings, and of the samples drawn from them.
        num: samples per model and guidance.
        guidances: constant ones that are swept; the prior's own is measured beside them.
        rounds: of timing.
        batch_size: images drawn at once; None estimates what fits.
        device: where networks run.
        threads: of torch on the CPU, for what is timed.
    """

    tokenizer: TokenizerRun
    prior: PriorRun
    seeds: tuple[int, ...]
    num: int
    guidances: tuple[str, ...] = ("1", "1.5", "2", "3", "5")
    rounds: int = 9
    batch_size: int | None = None
    device: str = "cpu"
    threads: int = 1


def srdd_setting(options: SrddStudyOptions, device: str, threads: int) -> SrddSetting:
    """What the options resolve to. Raises `UserError` for unknown presets."""
    budget, chosen = SRDD_BUDGETS[options.budget], {"data": options.data, "classes": options.chosen_classes}
    tokenizer, prior = tokenizer_preset(options.preset_tokenizer), prior_preset(options.preset_prior)
    return SrddSetting(
        tokenizer=replace(tokenizer, num_steps=round(tokenizer.num_steps * budget.tokenizer_steps), **chosen),
        prior=replace(
            prior,
            num_steps=round(prior.num_steps * budget.prior_steps),
            validate_every=max(round(prior.validate_every * budget.prior_steps), 1),
            scale_loss="token-uniform",
            **chosen,
        ),
        seeds=tuple(range(options.num_seeds)),
        num=options.num or budget.num,
        batch_size=options.batch_size,
        device=device,
        threads=threads,
    )
