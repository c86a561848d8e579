"""What images show, in words, as models read it: one line of text per image, "" where nothing is said.

Beside image files lies a `.txt` each, or a `metadata.jsonl` with `file_name` and `text` (the convention of `datasets`).
"""

import codecs
import json
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isthmus.data.source import logger
from isthmus.data.views import usable_processors
from isthmus.errors import UserError

LONGEST_CAPTION = 2_000
"""Characters; more than any text encoder reads."""
METADATA = "metadata.jsonl"
# of a .txt file: what is longer is no caption
_BYTES = 16 * LONGEST_CAPTION
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def clean_caption(text: str) -> str:
    r"""One line in composed letters, at most `LONGEST_CAPTION` characters, cut between words where there are any.

    Control characters and line ends become spaces; what no file could hold becomes a replacement character.

    >>> clean_caption("  a critter,\n\tdome\x00body "), clean_caption("cafe\u0301")
    ('a critter, dome body', 'café')
    """
    head = text[: 4 * LONGEST_CAPTION].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    composed = unicodedata.normalize("NFC", head)
    line = " ".join("".join(" " if unicodedata.category(one) == "Cc" else one for one in composed).split())
    if len(line) <= LONGEST_CAPTION:
        return line
    kept, space, _ = line[: LONGEST_CAPTION + 1].rpartition(" ")
    return kept if space else line[:LONGEST_CAPTION]


def varied(caption: str, generator: np.random.Generator) -> str:
    """What a caption says between its commas in another order, some of it left out; what it begins with stays in front.

    So short prompts are learned too. Draws 1 + n numbers and a permutation, for n parts behind the first.

    >>> varied("a critter", np.random.default_rng(0))
    'a critter'
    """
    noun, *words = caption.split(", ")
    kept = generator.random(len(words)) < generator.uniform(0.3, 1.2)
    return ", ".join([noun, *(words[i] for i in generator.permutation(len(words)) if kept[i])])


def usable_captions(
    found: Sequence[str | None], *, source: str, where: str, needed: bool = True, quiet: bool = False
) -> tuple[str, ...]:
    """Captions of all images of a set, cleaned; how many were odd, and in which way, is said.

    Args:
        found: as they were read; None where an image has none.
        source: name of the data set.
        where: what they were read from.
        needed: whether it is an error that all are empty.
        quiet: as information and no warning.

    Raises:
        UserError: no image has a caption, and `needed`.
    """
    captions = tuple(clean_caption(text or "") for text in found)
    if needed and not any(captions):
        raise UserError(
            f"{source}: captions must say something, but those in {where} are empty for all {len(captions)} images. "
            "Fill them, or take them away to read the images without."
        )
    counts = {
        "without one": sum(text is None for text in found),
        "empty": sum(text is not None and not caption for text, caption in zip(found, captions, strict=True)),
        f"cut to {LONGEST_CAPTION} characters": sum(len(text or "") > LONGEST_CAPTION for text in found),
        "with control characters, which became spaces": sum(map(_has_controls, found)),
        "with letters that cannot be read (write UTF-8)": sum(_UNREADABLE in caption for caption in captions),
    }
    odd = ", ".join(f"{number} {words}" for words, number in counts.items() if number)
    if odd:
        level = logging.INFO if quiet else logging.WARNING
        logger.log(level, "%s: captions in %s of %d images: %s", source, where, len(captions), odd)
    return captions


def _has_controls(text: str | None) -> bool:
    """Whether there are control characters other than line ends and tabs."""
    return any(unicodedata.category(one) == "Cc" and not one.isspace() for one in (text or "")[:LONGEST_CAPTION])


@dataclass(frozen=True)
class FoundCaptions:
    """Captions of image files as they were read, and from what; no `texts` where nothing holds any."""

    texts: tuple[str | None, ...] | None
    where: str


def captions_of_files(root: Path, files: Sequence[str], *, needed: bool = True) -> FoundCaptions:
    """Captions of image files below `root`: the `.txt` beside each, else what the nearest `metadata.jsonl` above says.

    Raises UserError for a `metadata.jsonl` that cannot be read, and where captions are `needed` for one whose texts
    belong to none of these images.
    """
    listed = _listed(root, files)
    described = _described(root, listed)
    # nearest last, so that it is what stays
    told: dict[str, str | None] = {}
    for folder in sorted(described, key=len):
        told |= {os.path.normpath(os.path.join(folder, name)): text for name, text in described[folder].items()}
    texts = [told.get(os.path.normpath(file)) for file in files]
    holders = [str(Path(folder) / METADATA) for folder in described if described[folder]]
    if needed and holders and all(text is None for text in texts):
        raise UserError(
            f"{METADATA} must name the images it lies beside, but none of the {len(files)} images is a file_name in "
            f"{root / holders[0]}. Write their paths from the folder it lies in."
        )
    there = {i: name for i, file in enumerate(files) if (name := _text_file(file, listed)) is not None}
    with ThreadPoolExecutor(min(16, usable_processors())) as pool:
        for i, text in zip(there, pool.map(lambda name: _text_of(root / name), there.values()), strict=True):
            texts[i] = text
    where = " and ".join([*(holders[:1]), *([".txt files"] if there else [])])
    return FoundCaptions(tuple(texts) if where else None, where)


def any_captions(root: Path, files: Sequence[str]) -> bool:
    """Whether `captions_of_files` would find some; no `.txt` is read. UserError for what cannot be read, as that."""
    listed = _listed(root, files)
    return any(_text_file(file, listed) for file in files) or any(_described(root, listed).values())


def _listed(root: Path, files: Sequence[str]) -> dict[str, frozenset[str]]:
    """Names in all folders that files lie in, and in those above them up to the root, by folder."""
    folders = sorted({folder for file in files for folder in _folders_above(file)})
    return {folder: _names_in(root / folder) for folder in folders}


def _described(root: Path, listed: Mapping[str, frozenset[str]]) -> dict[str, dict[str, str | None]]:
    """What each `metadata.jsonl` says, by the folder that it lies in."""
    return {folder: _texts_in(root / folder / METADATA) for folder, names in listed.items() if METADATA in names}


def _text_file(file: str, listed: Mapping[str, frozenset[str]]) -> str | None:
    """The `.txt` beside a file, None where there is none."""
    beside = str(Path(file).with_suffix(".txt"))
    return beside if os.path.basename(beside) in listed[os.path.dirname(beside)] else None


def _folders_above(file: str) -> Iterator[str]:
    """The folders that a relative path lies in, from its own up to "", the root."""
    folder = os.path.dirname(file)
    while folder:
        yield folder
        folder = os.path.dirname(folder)
    yield ""


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:  # where images cannot be read either, which is said of them
        return frozenset()


def _text_of(file: Path) -> str | None:
    """The start of a text file in UTF-8, or UTF-16 with its mark; None where it cannot be read."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_BYTES)
    except OSError:
        return None
    kind = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    # a letter that is cut in two at the end is left out
    return codecs.getincrementaldecoder(kind)("replace").decode(data, final=len(data) < _BYTES)


def _texts_in(file: Path) -> dict[str, str | None]:
    """`text` by `file_name`; nothing where no line has a text: then the file says other things."""
    texts: dict[str, str | None] = {}
    has_texts = False
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} must be readable text in UTF-8 ({error}). Mend it, or take it away.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            said: Any = json.loads(line)
            if "file_name" not in said and "text" not in said:  # of other files than images
                continue
            name, text = said["file_name"], said.get("text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _wrong_line(file, number, line) from error
        if not isinstance(name, str) or not isinstance(text, str | None):
            raise _wrong_line(file, number, line)
        texts[name] = text
        has_texts |= "text" in said
    if not has_texts:
        logger.info("%s has no text, so it holds no captions.", file)
    return texts if has_texts else {}


def _wrong_line(file: Path, number: int, line: str) -> UserError:
    return UserError(
        f'every line of {file} must be like {{"file_name": "a.png", "text": "a red hat"}}, got {line.strip()[:60]!r} '
        f"in line {number}. Mend it, or take the file away."
    )
