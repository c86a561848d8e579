"""What a data set holds and on what terms, in a few lines: `isthmus info data`."""

import os
from collections.abc import Mapping

from isthmus.data.licences import OPENMOJI_ATTRIBUTION, PHOTOS_ATTRIBUTION
from isthmus.data.opening import BUILT_IN, open_source, parse_spec


def describe(spec: str, *, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Name, classes with their numbers of images, and licence lines of a data set.

    Built-in sets are described without being drawn, and even where their packages are not installed. Raises UserError
    as `open_source` does.
    """
    kind, _ = parse_spec(spec)
    if kind == "openmoji":
        from isthmus.data.openmoji import OPENMOJI_CLASSES, emoji_table

        drawn = [emoji.class_name for emoji in emoji_table()]
        counts = {name: drawn.count(name) for name in OPENMOJI_CLASSES}
        what = f"{len(drawn)} drawings on white, rendered at any size; 10 % of the base emoji of a class are held out"
        return _lines(spec, what, counts, OPENMOJI_ATTRIBUTION)
    if kind == "photos":
        from isthmus.data.photos import PHOTO_CLASSES

        what = (
            "random crops of ten photographs, endlessly many; a strip of each is held out. "
            "They show texture and conditioning, not generalisation to new scenes"
        )
        return _lines(spec, what, dict.fromkeys(PHOTO_CLASSES), PHOTOS_ATTRIBUTION)

    train, val = (open_source(spec, image_size=256, split=split, cache_dir=cache_dir) for split in ("train", "val"))
    counts = {name: int((train.labels == label).sum()) for label, name in enumerate(train.class_names)}
    what = f"{len(train)} images to train on, {len(val)} held out, {'labelled' if counts else 'unlabelled'}"
    return _lines(spec, what, counts, train.attribution or "Licence unknown: yours to know.")


def describe_built_in() -> str:
    """All built-in sets."""
    return "\n\n".join(describe(spec) for spec in BUILT_IN)


def _lines(spec: str, what: str, counts: Mapping[str, int | None], attribution: str) -> str:
    shown = [name if count is None else f"{name} {count}" for name, count in list(counts.items())[:20]]
    more = [f"... ({len(counts)} classes)"] if len(counts) > 20 else []
    classes = [f"  classes: {', '.join(shown + more)}"] if counts else []
    return "\n".join([f"{spec}: {what}", *classes, f"  {attribution}"])
