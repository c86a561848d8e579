"""A study from beginning to end: plan, experiments, tables, report."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch

from isthmus.errors import UserError
from isthmus.evaluation.record import circumstances
from isthmus.files import alone_in, contents, write_whole
from isthmus.pipelines.loading import choose_device
from isthmus.studies.experiments import Experiment, Values, facts_of, ordered, run_experiments
from isthmus.studies.measures import Lab
from isthmus.studies.options import DarStudyOptions, SrddStudyOptions
from isthmus.studies.report import write_study_report
from isthmus.studies.tables import Found, Setting, TableSpec

logger = logging.getLogger("isthmus")

_RECORD = "study.json"


@dataclass(frozen=True, kw_only=True)
class Study(Generic[Setting]):
    """All tables there are, and the title and first paragraph of the report."""

    name: str
    title: str
    tables: tuple[TableSpec[Setting], ...]
    summary: Callable[[Setting], str]

    @property
    def table_names(self) -> tuple[str, ...]:
        """In the order of the report."""
        return tuple(spec.name for spec in self.tables)

    def plan(self, setting: Setting, tables: Sequence[str]) -> list[Experiment]:
        """The experiments that these tables need, each once."""
        return ordered(
            experiment for spec in self.tables if spec.name in tables for experiment in spec.experiments(setting)
        )

    @alone_in("folder")
    def run(
        self,
        setting: Setting,
        folder: Path,
        *,
        tables: Sequence[str],
        facts: Mapping[str, Any],
        images: Mapping[str, str],
        made: Callable[[], Values],
    ) -> Path:
        """Run what is not finished, fill the tables of these names and write the report; returns report.md.

        `facts` are said at the end of the report, before those of the experiments; `images` are fingerprints by split;
        what is `made` (when, where, with which versions) is noted beside every result. Raises `UserError` where the
        folder holds something else, or experiments with other settings or images.
        """
        experiments = self.plan(setting, tables)
        claim_folder(folder, self.name, images)
        logger.info("study %s: %d experiments for the tables %s", self.name, len(experiments), ", ".join(tables))
        found = Found(setting, run_experiments(experiments, folder, Lab(setting, folder), made=made))
        filled = {spec.name: spec.make(found) for spec in self.tables if spec.name in tables}
        facts = {**facts, "images (sha256)": images, **facts_of(experiments, folder)}
        report = write_study_report(folder, self.title, self.summary(setting), self.tables, filled, facts)
        logger.info("done: %s", report)
        return report


def claim_folder(folder: Path, name: str, images: Mapping[str, str]) -> None:
    """Begin the record of a study, or find it again; `UserError` for a folder of something else or of other images."""
    record, now = folder / _RECORD, {"study": name, "images": dict(images)}
    if record.is_file():
        try:
            before = {key: json.loads(record.read_text(encoding="utf-8"))[key] for key in now}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{record} is not the record of a study. Choose another --out.") from error
        if before["study"] != name:
            raise UserError(f"{folder} holds the study {before['study']}, this is {name}. Choose another --out.")
        if before != now:
            raise UserError(f"{folder} holds a study of other images than --data has now. Choose another --out.")
        return
    if contents(folder):
        raise UserError(f"--out must be new, empty or the folder of this study, got {folder}. Choose another folder.")
    write_whole(record, json.dumps(now) + "\n")


def run_study(study: Study[Any], options: DarStudyOptions | SrddStudyOptions) -> Path:
    """Run the study that the options describe, from where it stopped; returns report.md.

    Sets the number of threads, and the device that trainings of this process take. Raises `UserError` as `Study.run`
    does, and for an option that is not usable.
    """
    tables, classes = options.tables_among(study.table_names), options.chosen_classes
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    if device.type == "cpu":
        # accelerate, which trainings ask for their device, takes any GPU it finds otherwise
        os.environ["ACCELERATE_USE_CPU"] = "true"
    setting = options.setting(device.type, torch.get_num_threads())
    folder = options.out or Path(f"study-{study.name}" + ("-full" if options.budget == "full" else ""))
    return study.run(
        setting,
        folder,
        tables=tables,
        facts={"budget": options.budget, "data": options.data, "classes": "all" if classes is None else classes},
        images={split: Lab(setting, folder).images(split).fingerprint for split in ("train", "val")},
        made=lambda: circumstances(device, processes=1),
    )
