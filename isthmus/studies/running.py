"""What both studies do around their experiments: choose device and threads, and note what they run on."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from isthmus.data.opening import open_source
from isthmus.evaluation.circumstances import circumstances
from isthmus.pipelines.loading import choose_device
from isthmus.studies.options import Budget, StudyOptions, chosen_tables, study_folder
from isthmus.studies.study import Study

Setting = TypeVar("Setting")
Options = TypeVar("Options", bound=StudyOptions)

_LOOK_PX = 32


def run_study(
    study: Study[Setting],
    options: Options,
    budgets: Mapping[str, Budget],
    make_setting: Callable[[Options, str, int], Setting],
) -> Path:
    """Run the study that the options describe, from where it stopped; returns report.md.

    Args:
        study: which one.
        options: as from the command line.
        budgets: what each budget of this study buys.
        make_setting: what the options resolve to on a device ("cpu", "cuda") with so many `threads`.

    Raises:
        UserError: an option is not usable, or the folder holds something else.
    """
    tables = chosen_tables(options.tables, budgets[options.budget].tables, study.table_names)
    device = prepared_device(options)
    setting = make_setting(options, device.type, torch.get_num_threads())
    return study.run(
        setting,
        study_folder(options, study.name),
        tables=tables,
        facts=study_facts(options),
        images=images_of(options),
        made=lambda: circumstances(device, processes=1),
    )


def prepared_device(options: StudyOptions) -> torch.device:
    """The device of the options, which trainings of this process take as well; sets the number of threads.

    Raises:
        UserError: there is no such device here.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    if device.type == "cpu":
        # accelerate, which trainings ask for their device, takes any GPU it finds otherwise
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return device


def images_of(options: StudyOptions) -> dict[str, str]:
    """Fingerprints of the images by split. Raises `UserError` where they cannot be used, before anything is written."""
    # the size is that at which drawings are rendered; any will do to see whether they are there and which they are
    sources = {
        split: open_source(options.data, image_size=_LOOK_PX, split=split, classes=options.chosen_classes)
        for split in ("train", "val")
    }
    return {split: source.fingerprint for split, source in sources.items()}


def study_facts(options: StudyOptions) -> dict[str, Any]:
    """What was asked for, beside the settings of the experiments."""
    classes = options.chosen_classes
    return {"budget": options.budget, "data": options.data, "classes": "all" if classes is None else classes}
