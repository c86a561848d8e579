"""The experiments of the study of SRDD, as data: which models are trained, drawn from and timed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from isthmus.studies.experiments import Experiment
from isthmus.studies.srdd_options import SrddSetting
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
    """

    name: str
    mask: Literal["causal", "markov"] = "markov"
    scale_loss: Literal["token-uniform", "lognormal"] = "token-uniform"
    tokenizer: str = TOKENIZER


MARKOV = Variant("markov")
CAUSAL = Variant("causal", mask="causal")
SHORT = Variant("short", tokenizer=SHORT_TOKENIZER)
LOGNORMAL = Variant("lognormal", scale_loss="lognormal")
VARIANTS = {variant.name: variant for variant in (MARKOV, CAUSAL, SHORT, LOGNORMAL)}


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
        model=replace(setting.prior.model, scale_attention=variant.mask),
    )


def tokenizer_experiment(setting: SrddSetting) -> Experiment:
    """The one tokenizer that all priors share."""
    return Experiment(name=TOKENIZER, kind="tokenizer", settings={"run": _run(setting.tokenizer)}, seconds=240)


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
                seconds=0.4 * setting.prior.num_steps,
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
            },
            after=(f"prior-{variant.name}-seed{seed}",),
            seconds=15 + 0.022 * setting.num * len(guidances),
        )


def _run(run: Run) -> dict[str, Any]:
    """A run without what the study fills in."""
    return {name: value for name, value in run_to_json(run).items() if name not in ("out", "tokenizer", "token_cache")}
