"""What both studies do before they start: choose device and threads, and note what they run on."""

import os
from typing import Any

import torch

from isthmus.data.opening import open_source
from isthmus.evaluation.circumstances import circumstances
from isthmus.pipelines.loading import choose_device
from isthmus.studies.options import StudyOptions

_LOOK_PX = 32


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


def check_data(options: StudyOptions) -> None:
    """Raise `UserError` where the images cannot be used, before anything is written."""
    for split in ("train", "val"):
        # the size is that at which drawings are rendered; any will do to see whether they are there
        open_source(options.data, image_size=_LOOK_PX, split=split, classes=options.chosen_classes)


def study_facts(options: StudyOptions, device: torch.device) -> dict[str, Any]:
    """What made the numbers, beside the settings of the experiments."""
    classes = options.chosen_classes
    return {
        "budget": options.budget,
        "data": options.data,
        "classes": "all" if classes is None else classes,
        **circumstances(device, processes=1),
    }
