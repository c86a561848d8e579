"""The experiments of the study of SRDD, as data: which models are trained, drawn from and timed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from isthmus.studies.experiments import Experiment
from isthmus.studies.options import BALANCE
from isthmus.studies.srdd_options import SrddSetting
from isthmus.studies.srdd_words import DRAWING, MODES, TAUGHT, WEIGHTS
from isthmus.training.config import PriorRun, Run, run_to_json

TOKENIZER, SHORT_TOKENIZER, SNR = "tokenizer", "tokenizer-short", "snr"


@dataclass(frozen=True)
class Variant:
    """A prior that differs from the others in one thing.

    Attributes:
        name: of its experiments.
        mask: of the attention between scales.
        scale_loss: weights of the scales in the loss.
        tokenizer: whose scales it predicts.
        refines: whether it is trained for refinement too.
    """

    name: str
    mask: Literal["causal", "markov"] = "markov"
    scale_loss: Literal["token-uniform", "lognormal"] = "token-uniform"
    tokenizer: str = TOKENIZER
    refines: bool = False


MARKOV = Variant("markov")
CAUSAL = Variant("causal", mask="causal")
SHORT = Variant("short", tokenizer=SHORT_TOKENIZER)
LOGNORMAL = Variant("lognormal", scale_loss="lognormal")
REFINING = Variant("refining", refines=True)
VARIANTS = {variant.name: variant for variant in (MARKOV, CAUSAL, SHORT, LOGNORMAL, REFINING)}


def every_second(scale_sizes: Sequence[int]) -> tuple[int, ...]:
    """Every second scale from the first on, and the last: what the paper's ten scales become when six are left.

    >>> every_second((1, 2, 3, 4, 5, 6, 8, 10, 13, 16)), every_second((1, 2, 3, 4, 6, 8))
    ((1, 3, 5, 8, 13, 16), (1, 3, 6, 8))
    """
    kept = tuple(scale_sizes[::2])
    return kept if kept[-1] == scale_sizes[-1] else (*kept, scale_sizes[-1])


def prior_run(setting: SrddSetting, variant: Variant, seed: int) -> PriorRun:
    """The run of a variant; where it goes and its tokenizer's folder are not said yet."""
    return replace(
        setting.prior,
        seed=seed,
        scale_loss=variant.scale_loss,
        refinement_probability=setting.refinement_probability if variant.refines else 0.0,
        model=replace(setting.prior.model, scale_attention=variant.mask),
    )


def tokenizer_experiment(setting: SrddSetting) -> Experiment:
    """The one tokenizer that all priors share."""
    return Experiment(name=TOKENIZER, kind="tokenizer", settings={"run": _run(setting.tokenizer)}, seconds=300)


def priors(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Tokenizers, then every variant with every seed."""
    yield tokenizer_experiment(setting)
    for variant in variants:
        if variant.tokenizer == SHORT_TOKENIZER:
            yield Experiment(name=SHORT_TOKENIZER, kind="shortened", after=(TOKENIZER,), seconds=2)
        for seed in setting.seeds:
            run = _run(prior_run(setting, variant, seed))
            yield Experiment(
                name=f"prior-{variant.name}-seed{seed}",
                kind="prior",
                settings={"variant": variant.name, "seed": seed, "run": run},
                after=(variant.tokenizer,),
                seconds=0.45 * setting.prior.num_steps,
            )


def samples(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant's evaluation at its own guidance, after its training."""
    variants = list(variants)
    yield from priors(setting, variants)
    for variant in variants:
        yield from _evaluations(setting, variant, "samples", (setting.prior.sampling.guidance,))


def sweeps(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant at every guidance of the sweep, and at its own."""
    variants = list(variants)
    yield from samples(setting, variants)
    for variant in variants:
        yield from _evaluations(setting, variant, "sweep", setting.guidances)


def cost(setting: SrddSetting, variants: Iterable[Variant]) -> Experiment:
    """Time and memory of variants against each other, at the first seed; times are those of one device and threads."""
    names = [variant.name for variant in variants]
    seed = setting.seeds[0]
    return Experiment(
        name=f"cost-{'-'.join(names)}",
        kind="cost",
        settings={
            "variants": names,
            "seed": seed,
            "rounds": setting.rounds,
            "device": setting.device,
            "threads": setting.threads,
        },
        after=tuple(f"prior-{name}-seed{seed}" for name in names),
        seconds=40,
    )


def snr(setting: SrddSetting) -> Iterator[Experiment]:
    """The signal-to-noise ratio of held-out images, which needs a tokenizer alone."""
    yield tokenizer_experiment(setting)
    yield Experiment(name=SNR, kind="snr", after=(TOKENIZER,), seconds=5)


def refinements(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant's draws in every mode of refinement."""
    variants = list(variants)
    yield from samples(setting, (MARKOV,))
    yield from priors(setting, variants)
    for variant in variants:
        for seed in setting.seeds:
            yield Experiment(
                name=f"refined-{variant.name}-seed{seed}",
                kind="refined",
                settings={
                    "variant": variant.name,
                    "seed": seed,
                    "num": setting.num,
                    "balance": BALANCE,
                    "modes": list(MODES),
                },
                after=(f"prior-{variant.name}-seed{seed}",),
                seconds=15 + 0.03 * setting.num * len(MODES),
            )


def distillations(setting: SrddSetting) -> Iterator[Experiment]:
    """Students of the Markov model, with and without its word, their samples and the time of a draw."""
    yield from samples(setting, (MARKOV,))
    for seed in setting.seeds:
        teacher, students = f"prior-{MARKOV.name}-seed{seed}", []
        for kind, weight in WEIGHTS.items():
            student = f"student-{kind}-seed{seed}"
            students.append(student)
            yield Experiment(
                name=student,
                kind="student",
                settings={"seed": seed, "weight": weight, "run": _run(replace(setting.student, seed=seed))},
                after=(teacher,),
                seconds=0.5 * setting.student.num_steps,
            )
            yield Experiment(
                name=f"samples-{student}",
                kind="student-samples",
                settings={
                    "student": student,
                    "seed": seed,
                    "num": setting.num,
                    "balance": BALANCE,
                    "guidances": [own_guidance(setting)],
                },
                after=(student,),
                seconds=25 + 0.03 * setting.num,
            )
    yield Experiment(
        name=DRAWING,
        kind="drawing",
        settings={"seed": setting.seeds[0], "device": setting.device, "threads": setting.threads},
        after=(f"prior-{MARKOV.name}-seed{setting.seeds[0]}", f"student-{TAUGHT}-seed{setting.seeds[0]}"),
        seconds=10,
    )


def edits(setting: SrddSetting, variants: Iterable[Variant]) -> Iterator[Experiment]:
    """Every variant's edits of held-out images."""
    variants = list(variants)
    yield from priors(setting, variants)
    for variant in variants:
        for seed in setting.seeds:
            yield Experiment(
                name=f"edits-{variant.name}-seed{seed}",
                kind="edits",
                settings={"variant": variant.name, "seed": seed, "jumps": list(setting.jumps)},
                after=(f"prior-{variant.name}-seed{seed}",),
                seconds=30,
            )


def own_guidance(setting: SrddSetting) -> str:
    """The guidance that the prior is saved with."""
    return setting.prior.sampling.guidance


def model_folder(folder: Path, experiment: str) -> Path:
    """Where a training writes its model."""
    return folder / experiment / "run"


def _evaluations(setting: SrddSetting, variant: Variant, kind: str, guidances: Sequence[str]) -> Iterator[Experiment]:
    for seed in setting.seeds:
        yield Experiment(
            name=f"{kind}-{variant.name}-seed{seed}",
            kind="evaluation",
            settings={
                "variant": variant.name,
                "seed": seed,
                "guidances": list(guidances),
                "num": setting.num,
                "balance": BALANCE,
            },
            after=(f"prior-{variant.name}-seed{seed}",),
            seconds=25 + 0.03 * setting.num * len(guidances),
        )


_FILLED_IN = ("out", "tokenizer", "token_cache", "from_model", "scale_sizes", "distillation_weight")


def _run(run: Run) -> dict[str, Any]:
    """A run without what the study fills in."""
    return {name: value for name, value in run_to_json(run).items() if name not in _FILLED_IN}
