"""The `.npz` files of ADM's evaluator (Dhariwal and Nichol, 2021): images (arr_0, arr_1), or statistics of a reference.

An image file holds arr_0 uint8 (N, H, W, 3) and, where there are labels, arr_1 (N,); ours also name their classes in
`class_names`, which ADM's evaluator does not read. A statistics file holds mu and sigma of pooled Inception features,
and mu_s and sigma_s of spatial ones, which are left alone: there is no sFID here. ADM's reference batches hold both:
some of the images, and statistics of the whole data set. Images stream: a file may be larger than memory.
"""

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Literal, cast

import numpy as np
from jaxtyping import Float, Int, UInt8

from isthmus.errors import UserError
from isthmus.files import write_whole

_FAILURES = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
_VALUES_AT_ONCE = 2**20
_ORIGIN = "isthmus_"


@dataclass(frozen=True)
class StatisticsOrigin:
    """What our own files say of their statistics: feature space, weights and preprocessing of its network, images."""

    space: str
    weights_sha256: str
    preprocessing: str
    count: int


@dataclass(frozen=True)
class AdmImages:
    """Images of a file; iterate to read them, as often as you like. `shape` is (N, H, W, 3).

    `class_names` are by label, empty where the file does not name its classes.
    """

    path: Path
    shape: tuple[int, int, int, int]
    labels: Int[np.ndarray, " n"] | None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Image after image, uint8. Raises UserError where the file ends too early."""
        size = math.prod(self.shape[1:])
        at_once = max(1, _VALUES_AT_ONCE // size)
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            _header(member)
            for start in range(0, len(self), at_once):
                count = min(at_once, len(self) - start)
                try:
                    data = member.read(count * size)
                except _FAILURES as error:
                    raise _unreadable(self.path, error) from error
                if len(data) < count * size:
                    raise UserError(
                        f"{self.path} ends at image {start + len(data) // size} of {len(self)}. Copy it again."
                    )
                yield from np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])


def kind_of_npz(path: Path) -> Literal["images", "statistics", "both"]:
    """What an ADM file holds. Raises UserError where it is neither, or cannot be read."""
    names = _names(path)
    images, statistics = "arr_0" in names, {"mu", "sigma"} <= names
    if images:
        return "both" if statistics else "images"
    if statistics:
        return "statistics"
    held = ", ".join(sorted(names)[:6]) or "nothing"
    raise UserError(
        f"{path} must hold arr_0 (images) or mu and sigma (statistics), got {held}. "
        "Save images with np.savez(file, images)."
    )


def read_adm_images(path: Path) -> AdmImages:
    """Shape, labels and names of classes of a file with images.

    Raises:
        UserError: arr_0 is not uint8 (N, H, W, 3) in C order, or arr_1 or class_names do not fit it.
    """
    if kind_of_npz(path) == "statistics":
        raise UserError(f"{path} holds statistics, not images. Pass a file with arr_0.")
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            shape, fortran, dtype = _header(member)
        with np.load(path, allow_pickle=False) as arrays:
            labels = arrays["arr_1"] if "arr_1" in arrays.files else None
            names = tuple(map(str, arrays["class_names"])) if "class_names" in arrays.files else ()
    except _FAILURES as error:
        raise _unreadable(path, error) from error
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise UserError(
            f"{path}: arr_0 must be uint8 of shape (N, H, W, 3), got {dtype} {shape}. "
            "Scale to 0..255 and put the channels last."
        )
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        raise UserError(
            f"{path}: arr_1 must hold {shape[0]} integers, got {labels.dtype} {labels.shape}. One label per image."
        )
    if labels is not None and names and not (0 <= int(labels.min()) and int(labels.max()) < len(names)):
        raise UserError(
            f"{path}: arr_1 must hold numbers of the {len(names)} class_names, got {labels.min()} to {labels.max()}. "
            "Leave class_names out, or name every class."
        )
    sides = cast(tuple[int, int, int, int], shape)
    return AdmImages(path, sides, None if labels is None else labels.astype(np.int64), names)


def write_adm_images(
    path: Path,
    images: Iterable[UInt8[np.ndarray, "h w 3"]],
    count: int,
    labels: Int[np.ndarray, " n"] | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Write images (0..255) as they come, whole or not at all; arr_1 and names where they are given.

    Raises:
        UserError: there are more or fewer images than `count`, their sizes differ, or there is none.
    """

    def write(file: BinaryIO) -> None:
        written, first = 0, None
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for image in images:
                    if first is None:
                        first = image.shape
                        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first)}
                        np.lib.format.write_array_header_1_0(cast(BinaryIO, member), header)
                    if image.shape != first or image.dtype != np.uint8:
                        raise UserError(f"images must be uint8 of one size {first}, got {image.dtype} {image.shape}.")
                    member.write(np.ascontiguousarray(image).tobytes())
                    written += 1
            if written != count or first is None:
                raise UserError(f"{path} was to hold {count} images, got {written}.")
            if labels is not None:
                _add(archive, "arr_1", labels.astype(np.int64))
            if class_names:
                _add(archive, "class_names", np.array(class_names))

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)


def read_statistics(
    path: Path,
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"], StatisticsOrigin | None]:
    """Mean and covariance of pooled features in a file, in float64; files of others do not say where they are from.

    Raises UserError where it holds none, or their shapes do not fit.
    """
    if not {"mu", "sigma"} <= _names(path):
        raise UserError(f"{path} holds no mu and sigma. Pass a statistics file.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
            origin = _origin(arrays)
    except _FAILURES as error:
        raise _unreadable(path, error) from error
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise UserError(
            f"{path}: sigma must be (d, d) where mu is (d,), got {covariance.shape} and {mean.shape}. Make it again."
        )
    return mean, covariance, origin


def write_statistics(
    path: Path,
    mean: Float[np.ndarray, " d"],
    covariance: Float[np.ndarray, "d d"],
    origin: StatisticsOrigin | None = None,
) -> None:
    """Write mu and sigma, and their origin where it is known, whole or not at all.

    ADM's evaluator also wants mu_s and sigma_s of spatial features and stops where they are missing, as here.
    """
    said = {} if origin is None else {_ORIGIN + name: np.array(value) for name, value in vars(origin).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.savez(file, allow_pickle=False, mu=mean, sigma=covariance, **said))


def _origin(arrays: np.lib.npyio.NpzFile) -> StatisticsOrigin | None:
    """None in files that others wrote. Raises ValueError where some of it is missing."""
    said = {name.removeprefix(_ORIGIN): arrays[name].item() for name in arrays.files if name.startswith(_ORIGIN)}
    if not said:
        return None
    try:
        return StatisticsOrigin(**said)
    except TypeError as error:
        raise ValueError(f"{_ORIGIN}*: {error}") from error


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(cast(BinaryIO, member), array, allow_pickle=False)


def _header(member: IO[bytes] | zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and type: what stands before the numbers of an array."""
    file = cast(BinaryIO, member)
    first = np.lib.format.read_magic(file) == (1, 0)
    return np.lib.format.read_array_header_1_0(file) if first else np.lib.format.read_array_header_2_0(file)


def _names(path: Path) -> set[str]:
    if not path.is_file():
        raise UserError(f"an .npz file is needed, got {path}, which is no file. Check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _FAILURES as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path} cannot be read ({' '.join(str(error).split())}). Save it with np.savez(file, images, labels)."
    )
