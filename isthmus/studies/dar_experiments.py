"""The experiments of the study of D-AR, as data: what is trained, decoded and drawn. A seed is a whole family."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from isthmus.studies.dar_options import DarSetting
from isthmus.studies.experiments import Experiment
from isthmus.studies.options import BALANCE
from isthmus.training.config import Run, run_to_json
from isthmus.training.dar_config import DiffusionTokenizerRun, NextTokenPriorRun


def tokenizer_run(setting: DarSetting, seed: int) -> DiffusionTokenizerRun:
    """The run of a tokenizer; where it goes is not said yet."""
    return replace(setting.tokenizer, seed=seed)


def prior_run(setting: DarSetting, seed: int) -> NextTokenPriorRun:
    """The run of a prior; where it goes and its tokenizer's folder are not said yet."""
    return replace(setting.prior, seed=seed)


def models(setting: DarSetting) -> Iterator[Experiment]:
    """A tokenizer and its prior for every seed."""
    for seed in setting.seeds:
        tokenizer, prior = tokenizer_run(setting, seed), prior_run(setting, seed)
        yield Experiment(
            name=f"tokenizer-seed{seed}",
            kind="tokenizer",
            settings={"seed": seed, "run": _run(tokenizer)},
            seconds=0.52 * tokenizer.num_steps,
        )
        yield Experiment(
            name=f"prior-seed{seed}",
            kind="prior",
            settings={"seed": seed, "run": _run(prior)},
            after=(f"tokenizer-seed{seed}",),
            seconds=0.26 * prior.num_steps,
        )


def on_held_out(setting: DarSetting, kind: str, *, seconds: float, **settings: Any) -> Iterator[Experiment]:
    """One experiment for every seed that reads held-out images, after the models."""
    yield from models(setting)
    for seed in setting.seeds:
        yield Experiment(
            name=f"{kind}-seed{seed}",
            kind=kind,
            settings={"seed": seed, **settings},
            after=(f"prior-seed{seed}",),
            seconds=seconds,
        )


def evaluations(setting: DarSetting) -> Iterator[Experiment]:
    """Every model at its own guidance and at the others."""
    guidances = all_guidances(setting)
    yield from models(setting)
    for seed in setting.seeds:
        yield Experiment(
            name=f"guidance-seed{seed}",
            kind="evaluation",
            settings={"seed": seed, "guidances": list(guidances), "num": setting.num, "balance": BALANCE},
            after=(f"prior-seed{seed}",),
            seconds=30 + 0.15 * setting.num * len(guidances),
        )


def previews(setting: DarSetting) -> Iterator[Experiment]:
    """Samples after every solver step, at the model's own guidance."""
    yield from models(setting)
    for seed in setting.seeds:
        yield Experiment(
            name=f"previews-seed{seed}",
            kind="previews",
            settings={
                "seed": seed,
                "guidance": setting.prior.sampling.guidance,
                "num": setting.num,
                "balance": BALANCE,
            },
            after=(f"prior-seed{seed}",),
            seconds=30 + 0.2 * setting.num,
        )


def all_guidances(setting: DarSetting) -> Sequence[str]:
    """The prior's own guidance and the others, each once."""
    return tuple(dict.fromkeys((setting.prior.sampling.guidance, *setting.guidances)))


def model_folder(folder: Path, experiment: str) -> Path:
    """Where a training writes its model."""
    return folder / experiment / "run"


def _run(run: Run) -> dict[str, Any]:
    """A run without what the study fills in."""
    return {name: value for name, value in run_to_json(run).items() if name not in ("out", "tokenizer", "token_cache")}
