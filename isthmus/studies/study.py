"""A study from beginning to end: plan, experiments, tables, report."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch

from isthmus.errors import UserError
from isthmus.evaluation.record import circumstances
from isthmus.evaluation.report import fact_text, joined, markdown_picture, markdown_table, write_pages
from isthmus.files import alone_in, check_only, write_whole
from isthmus.pictures import draw_grid
from isthmus.pipelines.loading import choose_device
from isthmus.studies.experiments import Experiment, Values, facts_of, ordered, run_experiments
from isthmus.studies.measures import Lab
from isthmus.studies.options import StudyOptions
from isthmus.studies.tables import (
    RULE,
    Claim,
    Difference,
    Found,
    Panel,
    Setting,
    StudyTable,
    TableSpec,
    mean_and_half_width,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("isthmus")

_RECORD = "study.json"
_CLAIM_HEAD = ("claim of a paper", "source", "measured here", "could be seen", "verdict")


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
        report = write_study_report(self, self.summary(setting), folder, filled, facts)
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
    check_only(folder, "the folder of this study")
    write_whole(record, json.dumps(now) + "\n")


def write_study_report(
    study: Study[Any], summary: str, folder: Path, tables: Mapping[str, StudyTable], facts: Mapping[str, Any]
) -> Path:
    """Write report.md, which is returned, and report.html, with a picture per table with curves if matplotlib is there.

    Tables of the study that are not in `tables` are marked "not run"; `facts` made the numbers.
    """
    for spec in study.tables:
        # of an earlier run, maybe of other results
        (folder / f"{spec.name}.png").unlink(missing_ok=True)
    try:
        for name, table in tables.items():
            if table.panels:
                draw_grid(table.panels, _draw_panel, folder / f"{name}.png")
    except ImportError:
        logger.warning('The report has no plots: they need matplotlib. Run: pip install "isthmus[eval]"')
    text = joined([f"# {study.title}", summary, *_parts(folder, study.tables, tables, facts)])
    write_pages(folder, text, title=study.title)
    return folder / "report.md"


def _draw_panel(axis: "Axes", panel: Panel) -> None:
    for name, points in panel.lines.items():
        means, widths = zip(*map(mean_and_half_width, points.values()), strict=True)
        bars = None if None in widths else widths
        axis.errorbar(list(points), means, yerr=bars, label=name, marker="o", markersize=3, capsize=2)
    if panel.level is not None:
        name, value = panel.level
        axis.axhline(value, color="tab:green", linestyle="--", label=name)
    axis.set_xlabel(panel.along)
    axis.set_title(panel.title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def difference_text(found: Difference, repetitions: str = "seeds") -> str:
    """First minus second, as a cell; `repetitions` are what it is a mean over.

    >>> difference_text(Difference(-0.5, 0.25, 3)), difference_text(Difference(float("nan"), None, 0))
    ('-0.5 [-0.75, -0.25] (3 seeds)', 'not measured')
    """
    if not found.num_seeds:
        return "not measured"
    seeds = f"one {repetitions.removesuffix('s')}" if found.num_seeds == 1 else f"{found.num_seeds} {repetitions}"
    value, half_width = found.value, found.half_width
    if half_width is None:
        return f"{value:.4g}, no interval ({seeds})"
    interval = f" [{value - half_width:.4g}, {value + half_width:.4g}]" if half_width else ""
    return f"{value:.4g}{interval} ({seeds})"


def _parts(
    folder: Path, specs: Sequence[TableSpec[Any]], tables: Mapping[str, StudyTable], facts: Mapping[str, Any]
) -> Iterator[str]:
    claims = {name: list(_claim_cells(table)) for name, table in tables.items()}
    rows = [(spec.title, *cells) for spec in specs for cells in claims.get(spec.name, ())]
    if rows:
        unknown = sum(row[-1].startswith("cannot tell") for row in rows)
        yield "## Claims"
        yield markdown_table(("table", *_CLAIM_HEAD), rows)
        yield RULE
        yield (
            f"{len(rows)} verdicts stand here, of which {unknown} cannot be told, each by a 95 % interval of its own: "
            'where nothing differs at all, about one in twenty would still not be "cannot tell". Read a single verdict '
            "with that in mind."
        )
    for spec in specs:
        yield f"## {spec.title}"
        if spec.name not in tables:
            yield f"Not run. `--tables {spec.name}` or `--budget full` fills this table."
            continue
        table, picture = tables[spec.name], folder / f"{spec.name}.png"
        yield table.about
        yield markdown_table(*table.text())
        if claims[spec.name]:
            yield markdown_table(_CLAIM_HEAD, claims[spec.name])
        if table.panels and picture.is_file():
            titles = "; ".join(panel.title for panel in table.panels)
            yield markdown_picture(picture, f"{titles} (bars: 95 % intervals)")
        yield from table.notes
    yield "## What made these numbers"
    yield markdown_table(("what", "value"), [(name, fact_text(value)) for name, value in facts.items()])


def _claim_cells(table: StudyTable) -> Iterator[tuple[str, str, str, str, str]]:
    for claim, found in table.findings():
        gap = difference_text(found, table.repetitions(claim.column))
        measured = f"{claim.column}, {claim.first} minus {claim.second}: {gap}"
        yield claim.says, claim.source, measured, size_text(found.half_width, found.second), verdict_text(claim, found)


def size_text(size: float | None, of: float) -> str:
    """The size of a difference, also as a share of what it is a difference to, where that is a magnitude.

    >>> size_text(3.0, 200.0), size_text(3.0, -1.0), size_text(None, 1.0), size_text(0.0, 1.0)
    ('3 (1.5 %)', '3', '', '')
    """
    if not size:
        return ""
    share = f" ({100 * size / of:.3g} %)" if of > 0 else ""
    return f"{size:.3g}{share}"


def verdict_text(claim: Claim, found: Difference) -> str:
    """The verdict; where one cannot tell, how far apart the sides are at most.

    >>> claim = Claim("small", "", "a", "b", "size")
    >>> verdict_text(claim, Difference(-2.0, 1.0, 3, 10.0)), verdict_text(claim, Difference(-1.0, 2.0, 3, 10.0))
    ('agrees', 'cannot tell: at most 3 (30 %) apart')
    """
    verdict = found.verdict(claim.direction)
    most = size_text(found.at_most, found.second)
    return f"{verdict}: at most {most} apart" if verdict == "cannot tell" and most else verdict


def run_study(study: Study[Any], options: StudyOptions) -> Path:
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
