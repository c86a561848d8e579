"""The random views a run trains on: what suits its data set, but for the settings it names."""

from dataclasses import asdict, replace

from isthmus.data.augment import Augmentation
from isthmus.data.source import ImageSource
from isthmus.data.streaming import ImageStream
from isthmus.training.config import Run


def augmentation(run: Run, source: ImageSource | ImageStream) -> Augmentation:
    """The augmentation of a run on `source`."""
    named = {name: value for name, value in asdict(run.augment).items() if value is not None}
    return replace(source.augmentation, **named)
