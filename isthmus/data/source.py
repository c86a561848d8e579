"""What every data set offers: one split of labelled (or unlabelled) uint8 images, addressed by index.

Splits go by content: the same image lands on the same side wherever it lies and whatever its name.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from isthmus.data.images import Augmentation, ImageUint8
from isthmus.errors import UserError, nearest

logger = logging.getLogger("isthmus")

NO_LABELS = "none"
"""As the name of a label column: without labels, whatever columns there are."""


@dataclass(frozen=True)
class WantedColumns:
    """Columns that somebody asks for; None lets the table decide on images and labels, and reads no captions."""

    image: str | None = None
    label: str | None = None
    """Or `NO_LABELS`."""
    caption: str | None = None


ANY_COLUMNS = WantedColumns()


class ImageSource(ABC):
    """One split of one data set. Subclasses fill the attributes and say how an image is read.

    Attributes:
        class_names: one name per class; () when unlabelled (num_classes = 0).
        labels: below num_classes; all zeros when unlabelled.
        balanced: whether training draws all classes equally often.
        attribution: licence lines to print and to write into model cards ("" when unknown).
        captions: what every image shows in words, by index, as `clean_caption` makes it ("": nothing is said); None
            where the set has none.
        fingerprint: sha256 (hex) of the contents, captions included, the split and the settings that change pixels.
        in_memory: reading an image is so quick that worker processes would only cost time.
        augmentation: the one that suits these images.
    """

    name: str
    class_names: tuple[str, ...]
    labels: Int[np.ndarray, " n"]
    balanced: bool = False
    attribution: str = ""
    captions: Sequence[str] | None = None
    fingerprint: str
    in_memory: bool = False
    augmentation = Augmentation()

    @property
    def num_classes(self) -> int:
        """0 when unlabelled."""
        return len(self.class_names)

    @cached_property
    def flip(self) -> Bool[np.ndarray, " classes"]:
        """(max(num_classes, 1),): classes whose meaning survives a horizontal flip; all, where nothing else is said."""
        return np.ones(max(self.num_classes, 1), dtype=bool)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def load(self, index: int) -> ImageUint8:
        """Image `index` as uint8 (H, W, 3) at full size: sRGB, upright, alpha composited on white."""

    def draw(self, index: int, generator: np.random.Generator) -> ImageUint8:
        """The raw material of one training sample: the image itself, unless a set has endless ones."""
        return self.load(index)

    def varied_caption(self, caption: str, generator: np.random.Generator) -> str:
        """Other words for what a caption of this set says, or some of them, for training; the caption itself, unless a
        set knows how its captions are made.
        """
        return caption


class StreamedImage(NamedTuple):
    """One image of a stream: uint8 (H, W, 3), its label, its caption ("" where nothing is said)."""

    image: ImageUint8
    label: int
    caption: str = ""


class ImageStream(ABC):
    """A stream of labelled images: no index, no length. Subclasses fill the attributes of an `ImageSource` it has.

    Attributes:
        has_captions: whether its images have captions.
        fingerprint: sha256 (hex) of what the stream is; its contents have not been seen.
    """

    name: str
    class_names: tuple[str, ...]
    balanced: bool = False
    attribution: str = ""
    has_captions: bool = False
    fingerprint: str
    augmentation = Augmentation()

    @property
    def num_classes(self) -> int:
        """0 when unlabelled."""
        return len(self.class_names)

    def varied_caption(self, caption: str, generator: np.random.Generator) -> str:
        """As of an `ImageSource`."""
        return caption

    @abstractmethod
    def images(self) -> Iterator[StreamedImage]:
        """One pass over the images, in their order. UserError where none can be used."""


def choose_classes(available: Sequence[str], wanted: Sequence[str] | None, *, source: str) -> tuple[str, ...]:
    """The wanted class names in the order given; all of them for None or ("all",).

    Raises UserError for unknown names (with the nearest ones), repeated names, none at all, or unlabelled data.
    """
    if wanted is None or tuple(wanted) == ("all",):
        return tuple(available)
    if not available:
        raise UserError(
            f"{source} is unlabelled, so it has no classes to choose, got {', '.join(wanted)}. Leave them out."
        )
    if not wanted:
        raise UserError(f"at least one class is needed, got none. {source} has {first_names(available, 12)}.")
    for name in wanted:
        if name not in available:
            raise UserError(
                f"{source} has no class {name!r}, it has {first_names(available, 12)}.{nearest(name, available)}"
            )
    if len(set(wanted)) < len(wanted):
        raise UserError(f"every class may be named once, got {', '.join(wanted)}.")
    return tuple(wanted)


def first_names(names: Sequence[str], count: int) -> str:
    """Names in a sentence, no more than `count` of them."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def missing_extra(extra: str, package: str, error: ImportError | None = None) -> UserError:
    """The error for data that need an optional package, which is absent or (`error`) cannot be imported."""
    if error is not None and not isinstance(error, ModuleNotFoundError):
        return UserError(
            f"this data needs the package {package}, which cannot be imported ({error}). Install it again: "
            f'pip install --force-reinstall "isthmus[{extra}]"'
        )
    return UserError(
        f'this data needs the package {package}, which is not installed. Run: pip install "isthmus[{extra}]"'
    )


def held_out(
    hashes: list[str], labels: Int[np.ndarray, " n"], val_fraction: float, *, source: str
) -> Bool[np.ndarray, " n"]:
    """(N,) bool, True = held out. `hashes` are the images' content hashes (hex), `labels` (N,) their classes.

    An image is held out when its hash, read as a number in [0, 1), lies below `val_fraction`: adding images moves no
    other image. Equal contents stay together. Two corrections for tiny sets: every class keeps an image to train on,
    and one image is held out where that leaves every class one. All False means nothing can be held out.
    """
    forced_to_train: set[str] = set()
    below = np.array([int(digest[:12], 16) / 16**12 < val_fraction for digest in hashes])
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if below[members].all():
            forced_to_train.add(max(hashes[i] for i in members))
    mask = below & np.array([digest not in forced_to_train for digest in hashes])
    if val_fraction > 0 and not mask.any():
        mask = _hold_out_one(hashes, labels)
        if not mask.any():
            logger.warning(
                "%s: too few images to hold any out; held-out figures will be those of the training images", source
            )
    return mask


def rows_of_split(
    hashes: list[str], labels: Int[np.ndarray, " n"], val_fraction: float, split: str, *, source: str
) -> Int[np.ndarray, " rows"]:
    """Rows of the images that belong to `split` by `held_out`; all of them where nothing can be held out."""
    mask = held_out(hashes, labels, val_fraction, source=source)
    return np.flatnonzero(mask == (split == "val")) if mask.any() else np.arange(len(hashes))


def _hold_out_one(hashes: list[str], labels: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    contents = np.array(hashes)
    spare = [set(contents[labels == label]) for label in np.unique(labels)]
    for digest in sorted(set(hashes)):
        if all(kept - {digest} for kept in spare):
            return contents == digest
    return np.zeros(len(hashes), dtype=bool)
