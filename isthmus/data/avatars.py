"""Drawings without end, with captions: DiceBear's styles under CC0, rendered here and kept in the user's cache.

A drawing follows from its style, its split and its number. Its attributes ("body: dome", "body colour: teal") are what
the generator chose, its caption says them in words, and nothing else was decided: they can be read back from pixels.
"""

import colorsys
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from importlib.metadata import version
from itertools import combinations, count
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.data.captions import varied
from isthmus.data.images import Augmentation, ImageUint8, augmented_view, rendered_svg
from isthmus.data.licences import AVATARS_ATTRIBUTION
from isthmus.data.source import ImageSource, ImageStream, StreamedImage, choose_classes, logger, missing_extra
from isthmus.data.views import Batch, BatchedDataset, collate, usable_processors
from isthmus.display import Display
from isthmus.errors import UserError, nearest
from isthmus.files import cache_directory, sha256_of_file, sha256_of_parts, waited_for, write_whole
from isthmus.nn.draws import AUGMENT, stream

# style: what it shows, its parts and its colours, in the order of a caption; the first four make combinations
_STYLES = {
    "critters": ("a critter", "body top eyes mouth pattern cheeks", "body accent background"),
    "clay": ("a clay creature", "body top eyes mouth pattern", "body accent background"),
    "sprouts": ("a potted plant", "plant pot eyes mouth pattern cheeks", "plant bloom pot background"),
    "moods": ("a round face", "face eyes mouth cheeks", "face background"),
    "planets": ("a planet", "surface ring moons", "planet background"),
    "voxel-art": (
        "a voxel person",
        "top outfit eyes mouth eyebrows nose beard glasses cheeks",
        "skin hair hat shirt jacket pants shoes background",
    ),
    "voxel-bot": ("a voxel robot", "top eyes mouth chest", "body glow accent background"),
    "open-peeps": ("an ink person", "head expression accessories facialHair mask", "skin clothing"),
    "landscape": ("a landscape", "hill1 hill4 orb hill2 hill3", "hill1 hill2 hill3 hill4 orb background"),
    "cutouts": ("a paper face", "head hair eyes mouth nose brows cheeks", "paperFace paperHair background"),
    "gaze": ("a shape with eyes", "shape eyes spacing", "body"),
    "marbles": ("a marble face", "top eyes mouth blend nose", "sphere blend"),
    "stack": ("a stack of stones", "piles stone cap", "stoneDeep stoneMid stoneLight"),
    "pixel-art": ("a pixel person", "mouth hair glasses", "clothing hair skin mouth"),
}
AVATAR_STYLES = tuple(_STYLES)
_NOUNS = {
    "hill1": "far hill", "hill2": "second hill", "hill3": "third hill", "hill4": "near hill", "orb": "sun",
    "paperFace": "face", "paperHair": "hair", "stoneDeep": "dark stones", "stoneMid": "medium stones",
    "stoneLight": "light stones", "facialHair": "facial hair", "sphere": "marble",
}  # fmt: skip
# variants whose own names say little
_WORDS = {"wedgeInv": "upturned wedge", "uu": "curly", "smileLOL": "laughing", "o": "round", "sun": "plain round"}
_NO_WORDS = ("none", "default", "standard", "normal", "plain", "variant")
_COMBINED = 4
_HELD_OUT_SHARE = 0.02
# one with which every style has pairs to hold out: 5 to 16 % of its drawings have such a pair
_SALT = "9"
AVATAR_SPLITS = ("train", "val", "reference", "combinations", "reader-train", "reader-val")
"""`reference` are held-out drawings to measure against. `combinations` are drawings with a pair of attributes that no
drawing of the three before has. `reader-val` has both, and so has `reader-train`, where parts that are rare elsewhere
are usual: who learns to read sees enough of each.
"""
_OFTEN = 80  # %: how often parts are there in `reader-train`, unless they are there more often anyway
DEFAULT_AVATARS = 20_000
MIN_SIZE, MAX_SIZE = 8, 512
_CHUNK = 128
Attributes = dict[str, str]
"""What a drawing shows, such as {"style": "critters", "body": "dome", "body colour": "teal"}."""


class Avatars(ImageSource):
    """Rendered drawings of some styles, as many of each, one class per style; captions and attributes beside them."""

    balanced = True
    attribution = AVATARS_ATTRIBUTION
    in_memory = True
    # as they are: a moved or mirrored drawing shows nothing that another number would not
    augmentation = Augmentation(resize_ratio=1.0)

    def __init__(
        self,
        styles: Sequence[str] = AVATAR_STYLES,
        *,
        image_size: int,
        split: str = "train",
        classes: Sequence[str] | None = None,
        num_images: int = DEFAULT_AVATARS,
        cache_dir: str | Path | None = None,
    ) -> None:
        """Render (or find) the drawings.

        Args:
            styles: some of `AVATAR_STYLES`.
            image_size: pixels.
            split: one of `AVATAR_SPLITS`; val, combinations and reader-val have a tenth of `num_images`.
            classes: styles to keep, of `styles`.
            num_images: of the training split (or the reference, or of what a reader learns from), over all styles.
            cache_dir: see `cache_directory`.

        Raises:
            UserError: unknown styles, a size that cannot be drawn, fewer than one image per style, a missing extra.
        """
        self.name, self.class_names = _checked(styles, image_size, classes)
        number = num_images if split in ("train", "reference", "reader-train") else num_images // 10
        each = -(-number // len(self.class_names))
        if number < len(self.class_names):
            raise UserError(
                f"avatars need an image per style and ten times as many to train on, got {num_images} for "
                f"{len(self.class_names)} styles. Raise --max-images."
            )
        self.labels = np.arange(each * self.num_classes, dtype=np.int64) % self.num_classes
        self.flip = np.zeros(self.num_classes, dtype=bool)
        self._files = _rendered(self.class_names, split, -(-each // _CHUNK), image_size, cache_dir)
        notes = [[_note(file) for file in files] for files in self._files]
        shown = [[one for note in chunks for one in note["attributes"]] for chunks in notes]
        self.attributes: list[Attributes] = [shown[label][i // self.num_classes] for i, label in enumerate(self.labels)]
        """What every drawing shows, by index."""
        self.captions = [caption(attributes) for attributes in self.attributes]
        drawn = (note["sha256"] for chunks in notes for note in chunks)
        self.fingerprint = sha256_of_parts("avatars", split, each, *self.class_names, *drawn, *self.captions)
        self._open()

    def load(self, index: int) -> ImageUint8:
        """Drawing `index` as uint8 (image_size, image_size, 3)."""
        chunk, row = divmod(index // self.num_classes, _CHUNK)
        return np.array(self._pixels[index % self.num_classes][chunk][row])

    def varied_caption(self, caption: str, generator: np.random.Generator) -> str:
        """See `captions.varied`."""
        return varied(caption, generator)

    def _open(self) -> None:
        self._pixels = [[np.load(file, mmap_mode="r") for file in files] for files in self._files]

    def __getstate__(self) -> dict[str, object]:
        """Worker processes open the files again: a pickled memory map would be a copy of all pixels."""
        return {key: value for key, value in vars(self).items() if key != "_pixels"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """See __getstate__."""
        vars(self).update(state)
        self._open()


class AvatarStream(ImageStream):
    """Drawings without end, rendered when they are wanted: number n follows from (seed, n), and its style from n alone.

    They have no pair of attributes that `combinations` holds, and seeds of their own: all splits of `Avatars` but the
    reader's are held out, though simple styles may come to the same drawing twice.
    """

    balanced = True
    attribution = AVATARS_ATTRIBUTION
    has_captions = True
    augmentation = Avatars.augmentation

    def __init__(
        self,
        styles: Sequence[str] = AVATAR_STYLES,
        *,
        image_size: int,
        seed: int,
        classes: Sequence[str] | None = None,
    ) -> None:
        """`styles`, `classes` and `image_size` as for `Avatars`, and the same UserErrors."""
        self.name, self.class_names = _checked(styles, image_size, classes)
        for style in self.class_names:
            _style(style)
        self.image_size, self.seed = image_size, seed
        self.fingerprint = sha256_of_parts("avatars stream", _made_with(), seed, image_size, *self.class_names)

    def image(self, number: int) -> StreamedImage:
        """Drawing `number` (0, 1, 2, ...): uint8 (image_size, image_size, 3), its label and its caption."""
        turn, label = divmod(number, self.num_classes)
        svg, attributes = drawing(self.class_names[label], f"stream-{self.seed}", turn)
        return StreamedImage(rendered_svg(svg, self.image_size), label, caption(attributes))

    def varied_caption(self, caption: str, generator: np.random.Generator) -> str:
        """See `captions.varied`."""
        return varied(caption, generator)

    def images(self) -> Iterator[StreamedImage]:
        """All of them: there is no end."""
        return map(self.image, count())


class StreamedAvatars(BatchedDataset):
    """Views of an `AvatarStream` by position, which is the number of the drawing: `training_batches` takes them.

    What a run sees follows from (seed, position), whatever the number of processes and wherever it is resumed.
    """

    in_memory = False

    def __init__(self, source: AvatarStream, *, image_size: int, seed: int, augment: Augmentation) -> None:
        """`seed` decides the augmentation; the drawings are brought to `image_size` pixels."""
        self.source, self.image_size, self.seed, self.augment = source, image_size, seed, augment

    def batch(self, positions: Sequence[int]) -> Batch:
        """See `BatchedDataset`."""
        numbers = np.asarray(positions, dtype=np.int64)
        drawn = [self.source.image(int(number)) for number in numbers]
        views = [
            augmented_view(
                one.image, self.image_size, self.augment, stream(self.seed, AUGMENT, int(number)), may_flip=False
            )
            for one, number in zip(drawn, numbers, strict=True)
        ]
        return collate(views, np.array([one.label for one in drawn]), numbers, numbers)


def _checked(styles: Sequence[str], image_size: int, classes: Sequence[str] | None) -> tuple[str, tuple[str, ...]]:
    """The name of the data set and of its classes; UserError for what cannot be drawn."""
    check_styles(styles)
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise UserError(
            f"avatars are drawn at {MIN_SIZE} to {MAX_SIZE} pixels, got {image_size}. Choose an --image-size there."
        )
    chosen = "" if tuple(styles) == AVATAR_STYLES else ":" + ",".join(styles)
    return f"avatars{chosen}", choose_classes(tuple(styles), classes, source="avatars")


def styles_named(place: str) -> tuple[str, ...]:
    """The styles in `avatars:STYLE,...`, all for ""; UserError as `check_styles`.

    >>> styles_named("gaze, stack")
    ('gaze', 'stack')
    """
    if not place:
        return AVATAR_STYLES
    styles = tuple(name.strip() for name in place.split(",") if name.strip())
    check_styles(styles)
    return styles


def caption(attributes: Attributes, generator: np.random.Generator | None = None) -> str:
    """A drawing in words; with a generator in another order and with some left out, so that short prompts are learned.

    >>> caption({"style": "critters", "body": "dome", "eyes": "sleepy", "body colour": "light blue"})
    'a critter, dome body, sleepy eyes, light blue body'
    """
    noun = _STYLES[attributes["style"]][0]
    words = [f"{value} {name.removesuffix(' colour')}" for name, value in attributes.items() if name != "style"]
    whole = ", ".join([noun, *words])
    return whole if generator is None else varied(whole, generator)


def check_styles(styles: Sequence[str]) -> None:
    """Raise UserError unless every style is one of `AVATAR_STYLES`, under CC0, and named once."""
    for style in styles:
        if style in _STYLES:
            continue
        if style in ("avataaars", "avataaars-neutral", "bottts", "bottts-neutral"):
            raise UserError(f"avatars take styles under CC0, got {style}, which has terms of its own. {_choice()}")
        raise UserError(f"avatars have no style {style!r}.{nearest(style, AVATAR_STYLES)} {_choice()}")
    if not styles or len(set(styles)) < len(styles):
        raise UserError(f"avatars need styles that are each named once, got {', '.join(styles) or 'none'}.")


def _choice() -> str:
    return f"Choose among {', '.join(AVATAR_STYLES)}."


def attributes_of(style: str, options: Mapping[str, Any]) -> Attributes:
    """What a drawing shows, from the options that the generator chose: parts, then colours.

    Parts that are absent, or whose variant has a number and no name, are left out.
    """
    _, parts, colours = _STYLES[style]
    shown = {"style": style}
    for part in parts.split():
        if words := _variant_words(options.get(f"{part}Variant")):
            shown[_NOUNS.get(part, part)] = words
    for colour in colours.split():
        if values := options.get(f"{colour}Color"):
            named = skin_name(values[0]) if colour == "skin" else colour_name(values[0])
            shown[f"{_NOUNS.get(colour, colour)} colour"] = named
    return shown


def _variant_words(variant: str | None) -> str:
    """The name of a variant as words, "" where it says nothing.

    >>> _variant_words("earsDroop"), _variant_words("bangs2"), _variant_words("variant07")
    ('ears droop', 'bangs', '')
    """
    if variant is None:
        return ""
    words = _WORDS.get(variant) or re.sub(r"(?<=[a-z])([A-Z]+)", r" \1", re.sub(r"\d+$", "", variant)).lower()
    words = words.replace("gray", "grey")
    return "" if words in _NO_WORDS else words


def colour_name(colour: str) -> str:
    """A plain name of a colour in hexadecimal: its hue, and light or dark.

    >>> [colour_name(one) for one in ("#0f766e", "#fda4af", "#7b4a2d", "#e2e8f0")]
    ['dark teal', 'light pink', 'brown', 'white']
    """
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    chroma, degrees = max(red, green, blue) - min(red, green, blue), 360 * hue
    if chroma < 0.12 and (saturation < 0.45 or lightness > 0.9):
        return next(name for limit, name in _GREYS if lightness <= limit)
    if 12 <= degrees < 50 and lightness < 0.42:
        return "brown"
    name = next(name for limit, name in _HUES if degrees < limit)
    if lightness < 0.36:
        return f"dark {name.removeprefix('sky ')}"
    return f"light {name}" if lightness > 0.74 else name


_GREYS = ((0.12, "black"), (0.4, "dark grey"), (0.65, "grey"), (0.87, "light grey"), (1.0, "white"))
_HUES = (
    (12, "red"), (42, "orange"), (66, "yellow"), (90, "lime"), (158, "green"), (188, "teal"), (208, "sky blue"),
    (248, "blue"), (288, "purple"), (318, "magenta"), (354, "pink"), (360, "red"),
)  # fmt: skip


def skin_name(colour: str) -> str:
    """A skin colour by its lightness.

    >>> skin_name("#ffdbb4"), skin_name("#ae5d29"), skin_name("#694d3d")
    ('light', 'medium', 'dark')
    """
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return "light" if luminance > 0.68 else "dark" if luminance < 0.38 else "medium"


def attribute_names(style: str) -> tuple[str, ...]:
    """What a drawing of a style can be asked for: "body", "eyes", "body colour", in the order of its captions."""
    _, parts, colours = _STYLES[style]
    names = [_NOUNS.get(part, part) for part in parts.split()]
    return (*names, *(f"{_NOUNS.get(colour, colour)} colour" for colour in colours.split()))


def combined_pairs(attributes: Attributes) -> list[tuple[str, str]]:
    """The pairs of attributes ("body", "top") of a drawing that make combinations: of parts, and of colours where a
    style has fewer than four parts.
    """
    combined = attribute_names(attributes["style"])[:_COMBINED]
    return list(combinations([name for name in combined if name in attributes], 2))


def held_out_pairs(attributes: Attributes) -> list[tuple[str, str]]:
    """Those of a drawing whose values ("dome" and "fin") no training image has together: 2 % of all pairs of values."""
    said = {name: f"{name} {value}" for name, value in attributes.items()}
    pairs = combined_pairs(attributes)
    return [(one, other) for one, other in pairs if _is_held_out(attributes["style"], said[one], said[other])]


def _is_held_out(style: str, one: str, other: str) -> bool:
    digest = hashlib.sha256("|".join((_SALT, style, one, other)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < _HELD_OUT_SHARE


@cache
def _style(name: str) -> tuple[Any, dict[str, int]]:
    """A style of the generator, and the options that make its rare parts usual."""
    try:
        import dicebear
    except ImportError as error:
        raise missing_extra("demo", error.name or "dicebear-core", error) from error
    definition = json.loads((resources.files("dicebear_styles") / f"{name}.json").read_text(encoding="utf-8"))
    if (licence := definition["meta"]["license"]["name"]) != "CC0 1.0":
        raise UserError(f"avatars take styles under CC0 1.0, got {name}, which is under {licence} here. Leave it out.")
    parts = definition["components"].items()
    rare = [part for part, how in parts if how.get("probability", 100) < _OFTEN]
    return dicebear.Style(definition), {f"{part}Probability": _OFTEN for part in rare}


def drawing(style: str, split: str, index: int) -> tuple[str, Attributes]:
    """Drawing `index` of a style and a split, as SVG, and what it shows."""
    import dicebear

    drawn, usual = _style(style)
    options = usual if split == "reader-train" else {}
    for attempt in count():
        made = dicebear.Avatar(drawn, {"seed": f"{split}/{index}/{attempt}", **options})
        attributes = attributes_of(style, made.to_json()["options"])
        if split.startswith("reader") or bool(held_out_pairs(attributes)) == (split == "combinations"):
            return made.to_string(), attributes
    raise AssertionError("counting never ends")


def _made_with() -> str:
    """Versions of all that decides pixels."""
    return "-".join(version(name) for name in ("dicebear-core", "dicebear-styles", "resvg-py"))


def _rendered(
    styles: Sequence[str], split: str, chunks: int, image_size: int, cache_dir: str | Path | None
) -> list[list[Path]]:
    """The files of the first chunks of every style, rendered where they are missing or damaged."""
    for style in styles:
        _style(style)
    folder = cache_directory(cache_dir) / "avatars" / _made_with() / f"{image_size}px"
    folder.mkdir(parents=True, exist_ok=True)
    files = [[folder / f"{style}+{split}+{chunk}.npy" for chunk in range(chunks)] for style in styles]

    def missing() -> list[Path]:
        return [file for of_style in files for file in of_style if not _is_whole(file)]

    if missing():
        # of the processes of a launcher one draws, and the others find what it has drawn
        with waited_for(folder, "the folder of drawings"):
            if wanted := missing():
                _render_all(wanted, image_size)
    return files


def _render_all(files: Sequence[Path], image_size: int) -> None:
    """Render chunks in processes of their own: the generator is Python, which threads do not speed up.

    They are started as programs, so that a script need not be written for it. Raises UserError where one fails.
    """
    logger.info("%s", AVATARS_ATTRIBUTION)
    number = min(len(files), usable_processors())
    program = "import sys; from isthmus.data.avatars import render; render(int(sys.argv[1]), sys.argv[2:])"
    command = [sys.executable, "-c", program, str(image_size)]
    workers = [
        subprocess.Popen([*command, *map(str, files[i::number])], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(number)
    ]
    try:
        with Display("drawing avatars", len(files) * _CHUNK, "image") as bar:
            for worker in workers:
                assert worker.stdout is not None and worker.stderr is not None
                for _ in worker.stdout:
                    bar.update(_CHUNK)
                words = worker.stderr.read().decode(errors="replace").strip().splitlines()
                if worker.wait():
                    raise UserError(f"drawing avatars failed: {words[-1] if words else worker.returncode}.")
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def render(image_size: int, files: Sequence[str]) -> None:
    """Render chunks of drawings into files STYLE+SPLIT+CHUNK.npy, and write an empty line for each."""
    for file in map(Path, files):
        style, split, chunk = file.stem.split("+")
        made = [drawing(style, split, int(chunk) * _CHUNK + row) for row in range(_CHUNK)]
        pixels = np.stack([rendered_svg(svg, image_size) for svg, _ in made])
        write_whole(file, lambda opened, pixels=pixels: np.save(opened, pixels), flush=False)
        note = {"sha256": sha256_of_file(file), "attributes": [attributes for _, attributes in made]}
        write_whole(file.with_suffix(".json"), json.dumps(note), flush=False)
        print(flush=True)  # a byte: the pipe holds those of all chunks until somebody reads


def _note(file: Path) -> dict[str, Any]:
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def _is_whole(file: Path) -> bool:
    if not (file.exists() and file.with_suffix(".json").exists()):
        return False
    with suppress(OSError, ValueError, KeyError):
        if _note(file)["sha256"] == sha256_of_file(file):
            return True
    logger.warning("The cached drawings %s are damaged; they are drawn again.", file)
    return False
