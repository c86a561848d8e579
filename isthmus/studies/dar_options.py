"""Options of `isthmus study dar`, and what they resolve to. This file imports nothing heavy."""

from dataclasses import dataclass, replace

from isthmus.dar_presets import diffusion_tokenizer_preset, next_token_prior_preset
from isthmus.studies.options import Budget, StudyOptions
from isthmus.training.dar_config import DiffusionTokenizerRun, NextTokenPriorRun

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
