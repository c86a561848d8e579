"""Studies on tiny runs: 8 px, two classes, seconds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from isthmus.evaluation.record import circumstances
from isthmus.studies.experiments import Values, finished
from isthmus.studies.options import DarSetting, SrddSetting, TextSetting
from isthmus.studies.study import Study
from isthmus.studies.tables import Found
from tests.training.tiny_runs import (
    diffusion_tokenizer_run,
    next_token_prior_run,
    prior_run,
    tokenizer_run,
    write_images,
)
from tests.training.tiny_teacher import distill_run


def tiny_data(folder: Path) -> str:
    """80 images of two classes, so that eight are held out."""
    return write_images(folder / "squares.npz", count=80)


def run(study: Study, setting: Any, folder: Path, *, tables: Sequence[str] = (), **changes: Any) -> Path:
    """The study of this process; all tables unless some are named. Returns report.md."""
    given: dict[str, Any] = {
        "facts": {},
        "images": {"train": "", "val": ""},
        "made": lambda: circumstances(torch.device("cpu"), processes=1),
    }
    return study.run(setting, folder, tables=tables or study.table_names, **(given | changes))


def assert_seeds_are_subtracted(study: Study, setting: Any, folder: Path, *, not_by_seed: Sequence[str] = ()) -> None:
    """With a copy of seed 0 as seed 1, every difference of a finished study is that of one seed, and certain.

    Columns that begin with `not_by_seed` have one reading whatever the number of seeds.
    """
    twice = replace(setting, seeds=(0, 1))
    found = finished(study.plan(setting, study.table_names), folder)
    plan = study.plan(twice, study.table_names)
    results: dict[str, Values] = {one.name: found[one.name.replace("seed1", "seed0")] for one in plan}
    for spec in study.tables:
        table = spec.make(Found(twice, results))
        pairs = zip(spec.make(Found(setting, results)).findings(), table.findings(), strict=True)
        for (claim, one), (same, both) in pairs:
            assert claim == same
            # a table may name rows that the tiny setting does not have
            if claim.column in table.timed or claim.column.startswith(tuple(not_by_seed)) or not one.num_seeds:
                assert both.num_seeds == one.num_seeds
                continue
            assert (both.num_seeds, both.half_width, both.value) == (2, 0.0, one.value)


def srdd_setting(data: str, **changes) -> SrddSetting:
    """One seed, eight samples, three guidances with the prior's own."""
    setting = {
        "tokenizer": tokenizer_run(data, Path("unset")),
        "prior": prior_run(data, Path("unset"), ""),
        "student": distill_run(data, Path("unset"), Path("unset"), scale_sizes=None),
        "seeds": (0,),
        "num": 8,
        "guidances": ("1", "2"),
        "rounds": 2,
        "batch_size": 8,
    }
    return SrddSetting(**(setting | changes))


def dar_setting(data: str, **changes) -> DarSetting:
    """One seed, eight samples, two solvers of two numbers of steps."""
    setting = {
        "tokenizer": diffusion_tokenizer_run(data, Path("unset")),
        "prior": next_token_prior_run(data, Path("unset"), ""),
        "seeds": (0,),
        "num": 8,
        "guidances": ("1", "linear:1.1:8"),
        "solvers": ("euler", "adams-bashforth"),
        "solver_steps": (2, 4),
        "batch_size": 8,
    }
    return DarSetting(**(setting | changes))


def text_setting(**changes) -> TextSetting:
    """One seed of two arms and eight samples of two styles."""
    drawings = {"max_images": 40}
    setting = {
        "tokenizer": tokenizer_run("avatars:gaze,stack", Path("unset"), **drawings),
        "prior": prior_run("avatars:gaze,stack", Path("unset"), "", **drawings),
        "dar_tokenizer": diffusion_tokenizer_run("avatars:gaze,stack", Path("unset"), **drawings),
        "dar_prior": next_token_prior_run("avatars:gaze,stack", Path("unset"), "", **drawings),
        "arms": ("class", "cross", "prefix"),
        "num_classes": 2,
        "seeds": (0,),
        "num": 8,
        "guidances": (),
        "rounds": 2,
        "batch_size": 8,
    }
    return TextSetting(**(setting | changes))
