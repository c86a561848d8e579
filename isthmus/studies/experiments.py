"""Experiments as data, run one after the other; what is finished is never run twice.

An experiment has a folder of its own and is finished when its `result.json` is there, which appears whole or not.
After a kill, the one that was running goes on where its own files allow: at the last checkpoint, or the last image.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.errors import UserError
from isthmus.files import write_whole
from isthmus.training.config import Run, run_to_json

logger = logging.getLogger("isthmus")

RESULT = "result.json"
Values = dict[str, Any]
"""What an experiment found, or when, where and with which versions it ran, in JSON values."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One piece of work that reads the experiments `after`; its name, such as "prior-markov-seed0", is its folder's.

    `kind` is written beside the result, which is refused where it was made with other `settings` (JSON values).
    `seconds` are a rough cost on two cores with the small presets: the ratios tell how much is left.
    """

    name: str
    kind: str
    work: "Callable[[Any, Experiment], Values]"
    settings: dict[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    seconds: float = 1.0


def for_every_seed(
    seeds: Iterable[int],
    name: str,
    work: Callable[[Any, Experiment], Values],
    *,
    after: str,
    seconds: float,
    kind: str | None = None,
    **settings: Any,
) -> Iterator[Experiment]:
    """An experiment with each training seed; `name` and `after` lack it, and `kind` None is the name."""
    for seed in seeds:
        yield Experiment(
            name=f"{name}-seed{seed}",
            kind=kind or name,
            work=work,
            settings={"seed": seed, **settings},
            after=(f"{after}-seed{seed}",),
            seconds=seconds,
        )


def run_settings(run: Run, *filled_in: str) -> Values:
    """A run as settings of an experiment, without what the study fills in."""
    left_out = ("out", "tokenizer", "token_cache", *filled_in)
    return {name: value for name, value in run_to_json(run).items() if name not in left_out}


def ordered(experiments: Iterable[Experiment]) -> list[Experiment]:
    """Each experiment once, in the order given; ValueError for two of one name, or one before what it reads."""
    found: dict[str, Experiment] = {}
    for experiment in experiments:
        if found.setdefault(experiment.name, experiment) != experiment:
            raise ValueError(f"two experiments are called {experiment.name}.")
        missing = [name for name in experiment.after if name not in found]
        if missing:
            raise ValueError(f"{experiment.name} reads {missing[0]}, which does not come before it.")
    return list(found.values())


def finished(experiments: Sequence[Experiment], folder: Path) -> dict[str, Values]:
    """Results that are there, by name; `UserError` where one was made with other settings."""
    results = {}
    for experiment in experiments:
        record = _read(folder / experiment.name / RESULT)
        if record is None:
            continue
        before, now = record["settings"], json.loads(json.dumps(experiment.settings))
        changed = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if changed:
            raise UserError(
                f"{folder / experiment.name} was made with another {changed[0]} ({_short(before.get(changed[0]))}, now "
                f"{_short(now.get(changed[0]))}). Choose another --out, or ask for what it was made with."
            )
        results[experiment.name] = record["values"]
    return results


def run_experiments(
    experiments: Sequence[Experiment], folder: Path, lab: Any, *, made: Callable[[], Values]
) -> dict[str, Values]:
    """Run what is not finished; a line per experiment says how long it took and what is left. Returns all results.

    `lab` is what every work is given, and `made` tells what is noted beside every result. Raises `UserError` where a
    result was made with other settings.
    """
    results = finished(experiments, folder)
    left = [experiment for experiment in experiments if experiment.name not in results]
    if results:
        logger.info("%d of %d experiments are finished already", len(results), len(experiments))
    spent = planned = 0.0
    for index, experiment in enumerate(left):
        logger.info("%d/%d %s ...", len(experiments) - len(left) + index + 1, len(experiments), experiment.name)
        start = time.perf_counter()
        # as they will be read: a study that goes on makes the report of one that was never stopped
        values = json.loads(json.dumps(experiment.work(lab, experiment)))
        seconds = time.perf_counter() - start
        path = folder / experiment.name / RESULT
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"kind": experiment.kind, "settings": experiment.settings, "seconds": round(seconds, 3)}
        write_whole(path, json.dumps({**record, "made": made(), "values": values}, indent=1) + "\n")
        results[experiment.name] = values
        spent, planned = spent + seconds, planned + experiment.seconds
        rest = left[index + 1 :]
        ahead = sum(other.seconds for other in rest) * spent / planned
        in_words = f"{ahead:.0f} s" if ahead < 90 else f"{ahead / 60:.0f} min"
        logger.info("    %s: %.0f s; %d left, about %s", experiment.name, seconds, len(rest), in_words)
    return {experiment.name: results[experiment.name] for experiment in experiments}


def facts_of(experiments: Sequence[Experiment], folder: Path) -> Values:
    """What made the finished results: every fact of theirs, all values of one that differs between them.

    Dates are those of the first and the last. `minutes of all experiments` adds up the calls that finished them.
    """
    records = [record for one in experiments if (record := _read(folder / one.name / RESULT)) is not None]
    facts: Values = {"experiments": len(experiments)}
    for name in dict.fromkeys(name for record in records for name in record["made"]):
        found = [record["made"][name] for record in records if name in record["made"]]
        distinct = list({json.dumps(one): one for one in found}.values())
        if name == "date":
            distinct = list(dict.fromkeys((min(found), max(found))))
        facts[name] = distinct[0] if len(distinct) == 1 else distinct
    return facts | {"minutes of all experiments": sum(record["seconds"] for record in records) / 60}


def _read(path: Path) -> Values | None:
    """A record; None where there is none that can be read, so that the experiment runs again."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("settings", "values", "seconds", "made")}
    except (ValueError, KeyError, TypeError):
        logger.warning("%s cannot be read; its experiment runs again", path)
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
