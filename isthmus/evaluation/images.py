"""Images to measure or to measure against, wherever they lie: read one after the other, at one size.

A folder of samples (`isthmus sample`, `isthmus evaluate`), a folder of image files, an ADM `.npz`, or a data set; and
images that are ruined: the ceiling beside every distance.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from tqdm import tqdm

from isthmus.data.folder import FolderSource, folder_layout
from isthmus.data.images import centre_view
from isthmus.data.opening import BUILT_IN
from isthmus.data.source import ImageSource
from isthmus.errors import UserError
from isthmus.evaluation.adm_npz import read_adm_images
from isthmus.evaluation.record import number_of_samples
from isthmus.files import sha256_of_file, sha256_of_parts
from isthmus.pictures import spread
from isthmus.samples import MANIFEST, has_chunks, read

Picture = UInt8[np.ndarray, "h w 3"]
AnyPicture = UInt8[np.ndarray, "_ _ 3"]

RUINED_BLUR = 0.25
"""Deviation of the blur that leaves mean colour and a shimmer of layout, as a share of the shorter side."""


@dataclass(frozen=True)
class ImageSet:
    """Images that are read when they are iterated over, as often as you like.

    Attributes:
        name: what they are, in words.
        fingerprint: SHA-256 (hex) of their contents.
        labels: one class per image, or None.
        class_names: by label; empty where classes have no names.
        count: how many.
        read: starts a reading; None reads them one by one.
        at: image by number; None where only a whole reading is possible.
        resized: how the images were brought to their size, in words; "" where they are as they lie.
        captions: what every image shows, in words ("": nothing is said); None where the set has none.
    """

    name: str
    fingerprint: str
    labels: Int[np.ndarray, " n"] | None
    class_names: tuple[str, ...]
    count: int
    read: Callable[[], Iterator[Picture]] | None = None
    at: Callable[[int], Picture] | None = None
    resized: str = ""
    captions: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Picture]:
        if self.read is not None:
            return self.read()
        assert self.at is not None, "a set is read whole or one by one"
        return map(self.at, range(self.count))

    def shown(self, title: str) -> Iterator[Picture]:
        """A reading with a progress bar; UserError where the images have several sizes."""
        size = None
        for picture in tqdm(self, total=self.count, desc=title, unit="image", disable=None):
            size = size or picture.shape[:2]
            if picture.shape[:2] != size:
                raise UserError(
                    f"{self.name}: images must have one size, got {size} and {picture.shape[:2]}. Resize them first."
                )
            yield picture

    def size(self) -> tuple[int, int]:
        """Height and width of the first image, in pixels."""
        height, width, _ = next(iter(self)).shape
        return height, width


def real_images(source: ImageSource, image_size: int) -> ImageSet:
    """A split of a data set as it is evaluated: shorter side resized, centre crop."""

    def at(index: int) -> Picture:
        return centre_view(source.load(index), image_size)

    labels = source.labels if source.class_names else None
    fingerprint = sha256_of_parts(source.fingerprint, image_size)
    return ImageSet(source.name, fingerprint, labels, source.class_names, len(source), at=at, captions=source.captions)


def some(images: ImageSet, limit: int) -> ImageSet:
    """At most `limit` images of a set that can be asked for single ones, evenly spread over it."""
    if len(images) <= limit:
        return images
    read = images.at
    assert read is not None, "only sets of single images are thinned out"
    chosen = np.array(spread(len(images), limit))

    def at(index: int) -> Picture:
        return read(int(chosen[index]))

    labels = None if images.labels is None else images.labels[chosen]
    captions = None if images.captions is None else [images.captions[int(index)] for index in chosen]
    fingerprint = sha256_of_parts(images.fingerprint, limit)
    return ImageSet(
        f"{limit} of {images.name}", fingerprint, labels, images.class_names, limit, at=at, captions=captions
    )


def joined(sets: Sequence[ImageSet], name: str) -> ImageSet:
    """Several sets of the same classes, one after the other."""
    known = [one.labels for one in sets if one.labels is not None]
    return ImageSet(
        name,
        sha256_of_parts(*(one.fingerprint for one in sets)),
        np.concatenate(known) if len(known) == len(sets) else None,
        sets[0].class_names,
        sum(map(len, sets)),
        lambda: chain.from_iterable(sets),
    )


def local_path(path: Path) -> Path:
    """The path in `folder:PATH` and `npz:PATH`, as --data has it; a path that exists as it is written wins.

    Raises UserError where another kind of data is named.

    >>> local_path(Path("folder:pictures")).name
    'pictures'
    """
    kind, colon, place = str(path).partition(":")
    if path.exists() or not (colon or kind in BUILT_IN):
        return path
    if kind in ("folder", "npz") and place:
        return Path(os.path.expanduser(place))
    if kind in (*BUILT_IN, "hf"):
        raise UserError(f"images lie in an .npz file or a folder, got {path}. A data set is named with --data.")
    return path


def open_images(path: Path, *, size: tuple[int, int] | None = None) -> ImageSet:
    """Images of an `.npz` file or of a folder; of a folder with train/ and val/ (or test/), those of both.

    Args:
        path: an ADM file, the --out of `isthmus sample` or `isthmus evaluate`, or any folder of images (one folder per
            class, or none).
        size: height and width in pixels that images of a folder are wanted at. Where it is square, images of another
            size are brought to it (shorter side, centre crop); None, or a size that is not square, keeps theirs.

    Raises:
        UserError: there are no images, or they cannot be read.
    """
    path = local_path(path)
    if path.is_file():
        file = read_adm_images(path)
        return ImageSet(path.name, sha256_of_file(path), file.labels, file.class_names, len(file), lambda: iter(file))
    if not path.is_dir():
        raise UserError(f"images lie in an .npz file or a folder, got {path}, which is neither. Check the path.")
    for folder in (path / "samples", path):
        if (folder / MANIFEST).is_file():
            return _sampled(folder)
        if has_chunks(folder):
            raise UserError(
                f"{folder} holds samples of an earlier version (chunk_*.npz), which this one does not read. Draw them "
                "again."
            )
    layout = folder_layout(path)
    if layout.val is None:
        return _files(FolderSource(path, val_fraction=0.0), size)
    # each is named after the folder; what one split lacks is in the other
    parts = [_files(FolderSource(path, split=split), size) for split in ("train", "val")]
    return replace(joined(parts, parts[0].name), resized=parts[0].resized or parts[1].resized)


def _files(source: FolderSource, size: tuple[int, int] | None) -> ImageSet:
    """The images of a split, as they lie or at a square size."""
    if size is not None and size[0] == size[1]:
        if any(_size_of(source.root / file) != size for file in source.files):
            words = f"shorter side to {size[0]} px, central square"
            return replace(real_images(source, size[0]), resized=words)
    labels = source.labels if source.class_names else None
    return ImageSet(source.name, source.fingerprint, labels, source.class_names, len(source), at=source.load)


def _size_of(file: Path) -> tuple[int, int] | None:
    """Height and width, from the head of a file; None where it does not say."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError:
        return None


def _sampled(folder: Path) -> ImageSet:
    """Drawn images: of an evaluation the N that its record names, else all that are finished; not the grid beside."""
    above = folder.parent.parent if folder.parent.name == "sweep" else folder.parent
    samples = read(folder, number_of_samples(above) if folder.name == "samples" or above != folder.parent else None)
    words = {int(row["class_id"]): str(row["label"]) for row in samples.rows}
    labels, named = None, ()
    # a model without names of classes writes their numbers, which say nothing to a data set; "null" is no class
    if all(word not in (str(number), "null") for number, word in words.items()):
        known, labels = np.unique(samples.labels, return_inverse=True)
        named = tuple(words[int(number)] for number in known)
    digest = hashlib.sha256()
    for image in samples:
        digest.update(repr(image.shape).encode() + image.tobytes())
    return ImageSet(str(folder), digest.hexdigest(), labels, named, len(samples), at=samples.image)


def blurred(image_uint8: AnyPicture, deviation_px: float) -> AnyPicture:
    """The image under a Gaussian of this standard deviation (not 0), edges mirrored.

    >>> blurred(np.full((4, 5, 3), 7, np.uint8), 1.5).tolist() == np.full((4, 5, 3), 7).tolist()
    True
    """
    down, across = (_blur_matrix(length, deviation_px) for length in image_uint8.shape[:2])
    values = np.einsum("ih,hwc,jw->ijc", down, image_uint8.astype(np.float64), across, optimize=True)
    return values.round().clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=2)
def _blur_matrix(length: int, deviation_px: float) -> Float[np.ndarray, "length length"]:
    """The blur along one axis: a product with it takes a fraction of the time of the wide filter itself."""
    # not at the top of the file: it takes a while to import
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(np.eye(length), deviation_px, axis=0)


def ruined(images_uint8: Iterable[AnyPicture]) -> Iterator[AnyPicture]:
    """Every image blurred until mean colour and a shimmer of layout are left: what a model at its worst could draw."""
    for image in images_uint8:
        yield blurred(image, RUINED_BLUR * min(image.shape[:2]))
