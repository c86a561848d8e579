"""Ten photographs, and the endless crops they hold: real pixels without a download, class = photograph.

The photographs lie inside the wheels of scikit-image and scikit-learn; they are read as files, so that nothing is
imported and nothing is ever fetched. One edge strip of each photograph is held out: training crops never touch it,
evaluation crops lie inside it. Ten scenes show texture and conditioning, not generalisation to new scenes.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isthmus.data.images import Augmentation, ImageUint8, decode_image
from isthmus.data.licences import PHOTOS_ATTRIBUTION
from isthmus.data.source import ImageSource, choose_classes, missing_extra
from isthmus.files import sha256_of_parts
from isthmus.nn.draws import IMAGE, stream

TRAINING_CROPS_PER_PHOTO = 256
HELD_OUT_CROPS_PER_PHOTO = 50
SMALLEST_CROP, LARGEST_CROP = 64, 320  # pixels of the photograph
STRIP_FRACTION = 0.25


@dataclass(frozen=True)
class Photo:
    """A class name, the file in its package, and the edge whose strip is held out (one that shows the subject)."""

    class_name: str
    package: str
    file: str
    strip: str


PHOTOS = (
    Photo("astronaut", "skimage", "data/astronaut.png", "bottom"),
    Photo("cat", "skimage", "data/chelsea.png", "left"),
    Photo("coffee", "skimage", "data/coffee.png", "bottom"),
    Photo("rocket", "skimage", "data/rocket.jpg", "bottom"),
    Photo("gravel", "skimage", "data/gravel.png", "right"),
    Photo("galaxies", "skimage", "data/hubble_deep_field.jpg", "right"),
    Photo("retina", "skimage", "data/retina.jpg", "left"),
    Photo("tissue", "skimage", "data/ihc.png", "right"),
    Photo("palace", "sklearn", "datasets/images/china.jpg", "bottom"),
    Photo("flower", "sklearn", "datasets/images/flower.jpg", "bottom"),
)
PHOTO_CLASSES = tuple(photo.class_name for photo in PHOTOS)


class Photos(ImageSource):
    """Random square crops, 64 to 320 px of the photograph. `load` gives a fixed crop per index, `draw` a fresh one."""

    name = "photos"
    balanced = True
    attribution = PHOTOS_ATTRIBUTION
    in_memory = True
    augmentation = Augmentation(resize_ratio=1.0)  # the crops are random already

    def __init__(self, *, split: str = "train", classes: Sequence[str] | None = None) -> None:
        self.class_names = choose_classes(PHOTO_CLASSES, classes, source=self.name)
        self._split = split
        self.regions = [_region(PHOTOS[PHOTO_CLASSES.index(name)], split) for name in self.class_names]
        count = TRAINING_CROPS_PER_PHOTO if split == "train" else HELD_OUT_CROPS_PER_PHOTO
        self.labels = np.tile(np.arange(self.num_classes, dtype=np.int64), count)
        settings = (self.name, split, count, SMALLEST_CROP, LARGEST_CROP)
        self.fingerprint = sha256_of_parts(*settings, *self.class_names, *(r.tobytes() for r in self.regions))

    def load(self, index: int) -> ImageUint8:
        """Crop `index`, the same at every call."""
        return self.draw(index, stream(0, IMAGE, index, int(self._split == "val")))

    def draw(self, index: int, generator: np.random.Generator) -> ImageUint8:
        """A fresh crop of the photograph that `index` belongs to."""
        region = self.regions[self.labels[index]]
        height, width = region.shape[:2]
        side = int(generator.integers(SMALLEST_CROP, min(LARGEST_CROP, height, width), endpoint=True))
        top = int(generator.integers(height - side, endpoint=True))
        left = int(generator.integers(width - side, endpoint=True))
        return region[top : top + side, left : left + side]


def _region(photo: Photo, split: str) -> ImageUint8:
    """The part of a photograph that belongs to a split."""
    package = importlib.util.find_spec(photo.package)
    if package is None or package.origin is None:
        raise missing_extra("demo", {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photo.package])
    whole = decode_image((Path(package.origin).parent / photo.file).read_bytes())
    axis = 0 if photo.strip == "bottom" else 1
    before = STRIP_FRACTION if photo.strip == "left" else 1 - STRIP_FRACTION
    parts = np.split(whole, [round(whole.shape[axis] * before)], axis=axis)
    strip, kept = parts if photo.strip == "left" else reversed(parts)
    return np.ascontiguousarray(kept if split == "train" else strip)
