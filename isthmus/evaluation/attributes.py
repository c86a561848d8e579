"""What a drawing shows, read from its pixels: small networks that were trained on fresh avatars, one for each style.

They are trained once, on drawings that cost nothing, and kept in the cache. What one reads right of drawings that it
was not trained on is its ceiling: nobody can be seen to draw better.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isthmus.data.avatars import Attributes, Avatars, attribute_names, check_styles
from isthmus.display import Display
from isthmus.files import cache_directory, sha256_of_parts, waited_for
from isthmus.nn.draws import ORDER, stream
from isthmus.nn.precision import faster_type, whole_fp32
from isthmus.nn.saved_model import SavedModel, records_arguments
from isthmus.nn.shapes import Images
from isthmus.nn.stored_llama import fingerprint
from isthmus.pipelines.folder import written_whole

logger = logging.getLogger("isthmus")

ABSENT = ""
DRAWINGS, PASSES = 3_072, 10
"""Drawings of each style that a reader is trained on, and how often it sees each."""
_CEILING = "ceiling.json"
_FRESH = 256  # drawings of each style that its ceiling is measured on
_BATCH, _READ_AT_ONCE = 64, 256
_LEARNING_RATE, _WEIGHT_DECAY = 1e-2, 0.05
# of the maps that the convolutions work on, whatever the size of the drawings: time does not grow with it
_GRID = 16


class AttributeReader(SavedModel):
    """Convolutions over the pixels of a drawing of one style, and a choice among the values of each attribute.

    Args:
        values: attribute -> what it can be, `ABSENT` ("") included.
        image_size: side of the drawings, in pixels.
        width: channels of the finest maps.
    """

    @records_arguments
    def __init__(self, *, values: Mapping[str, Sequence[str]], image_size: int, width: int = 32):
        super().__init__()
        # by name: a saved configuration has its keys in this order
        self.values = {name: tuple(values[name]) for name in sorted(values)}
        patch = max(1, image_size // _GRID)
        layers = [(3, width, 3 * patch, patch, patch)]
        layers += [(before * width, after * width, 3, step, 1) for before, after, step in _LAYERS]
        self.trunk = nn.Sequential()
        for before, after, kernel, step, padding in layers:
            self.trunk.append(nn.Conv2d(before, after, kernel, stride=step, padding=padding, bias=False))
            self.trunk.append(nn.BatchNorm2d(after))
            self.trunk.append(nn.ReLU())
        side = -(-(image_size // patch) // 4)
        self.head = nn.Linear(4 * width * side**2, sum(map(len, self.values.values())))

    def forward(self, images: Images) -> dict[str, Float[Tensor, "b values"]]:
        """Logits of the values of each attribute, by its name."""
        logits = self.head(self.trunk(images).flatten(1))
        return dict(zip(self.values, logits.split([*map(len, self.values.values())], dim=1), strict=True))

    @torch.no_grad()
    @whole_fp32()
    def read(self, images: Images) -> list[Attributes]:
        """What drawings in [-1, 1] show; an attribute that is not there is left out."""
        shown: list[Attributes] = []
        for some in images.split(_READ_AT_ONCE):
            chosen = {name: logits.argmax(dim=1).tolist() for name, logits in self(some.to(self.device)).items()}
            for row in range(len(some)):
                named = {name: self.values[name][indices[row]] for name, indices in chosen.items()}
                shown.append({name: value for name, value in named.items() if value != ABSENT})
        return shown


# channels before and after, in widths, and stride
_LAYERS = ((1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2))


@dataclass(frozen=True)
class Found:
    """Attributes asked for and found, of some drawings."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Of what was asked for; NaN where nothing was."""
        return self.right / self.asked if self.asked else float("nan")


def attributes_found(asked: Sequence[Attributes], shown: Sequence[Attributes]) -> dict[tuple[str, str], Found]:
    """How often what was asked for is shown, by style and attribute. What was not asked for is not looked at.

    >>> attributes_found([{"style": "gaze", "shape": "egg"}], [{"style": "gaze", "shape": "arch"}])
    {('gaze', 'shape'): Found(right=0, asked=1)}
    """
    counts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for wanted, seen in zip(asked, shown, strict=True):
        for name, value in wanted.items():
            if name != "style":
                counts[wanted["style"], name].append(seen.get(name) == value)
    return {key: Found(sum(hits), len(hits)) for key, hits in counts.items()}


@dataclass(frozen=True, eq=False)
class AttributeReaders:
    """A reader for each of some styles, all of one image size.

    Attributes:
        by_style: in eval mode.
        ceiling: style, attribute -> what is read right of fresh drawings.
        training: how they were trained, in words.
    """

    by_style: Mapping[str, AttributeReader]
    ceiling: Mapping[tuple[str, str], Found]
    training: str

    def read(self, images: Images, styles: Sequence[str]) -> list[Attributes]:
        """What drawings in [-1, 1] show, given the style of each, which is among what is returned."""
        shown: list[Attributes] = [{}] * len(styles)
        for style in dict.fromkeys(styles):
            rows = [row for row, other in enumerate(styles) if other == style]
            for row, found in zip(rows, self.by_style[style].read(images[rows]), strict=True):
                shown[row] = {"style": style, **found}
        return shown

    def facts(self) -> dict[str, Any]:
        """What a record says of them, in JSON values."""
        right, asked = (sum(getattr(one, name) for one in self.ceiling.values()) for name in ("right", "asked"))
        return {
            "fingerprint": sha256_of_parts(*(fingerprint(self.by_style[style]) for style in sorted(self.by_style))),
            "training": self.training,
            "fresh attributes read": asked,
            "right": right / asked,
        }


def attribute_readers(
    image_size: int,
    styles: Sequence[str],
    *,
    drawings: int = DRAWINGS,
    passes: int = PASSES,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> AttributeReaders:
    """The readers of some styles at a size; those that the cache has not are trained.

    That takes a core about 12 seconds for each style (8 with bf16 products), and drawing as long again.

    Args:
        drawings: of each style, to train on.
        passes: how often each of them is seen.
        seed: of the first weights and of the order.
        cache_dir: see `cache_directory`.
        device: where they are trained, and read.

    Raises UserError where a style is unknown, or the extra `demo` is not installed.
    """
    check_styles(styles)
    folder = cache_directory(cache_dir) / "attribute-readers"
    folder.mkdir(parents=True, exist_ok=True)
    places = {style: folder / f"{style}-{image_size}px-{drawings}x{passes}-seed{seed}" for style in styles}

    def missing() -> list[str]:
        return [style for style, place in places.items() if not place.is_dir()]

    if missing():
        # of several processes one trains, and the others find what it has trained
        with waited_for(folder, "the folder of attribute readers"):
            if wanted := missing():
                rendered = {"image_size": image_size, "cache_dir": cache_dir}
                train = Avatars(wanted, split="reader-train", num_images=drawings * len(wanted), **rendered)
                fresh = Avatars(wanted, split="reader-val", num_images=10 * _FRESH * len(wanted), **rendered)
                steps = -(-drawings // _BATCH) * passes * len(wanted)
                with Display("learning to read attributes", steps, "step", images_each=_BATCH) as bar:
                    for style in wanted:
                        reader = _trained(train, style, passes, seed, torch.device(device), bar)
                        found = _ceiling(reader, fresh, style)
                        with written_whole(places[style]) as temporary:
                            reader.save_pretrained(temporary)
                            rows = {name: [one.right, one.asked] for (_, name), one in found.items()}
                            (temporary / _CEILING).write_text(json.dumps(rows), encoding="utf-8")
    ceiling = {
        (style, name): Found(right, asked)
        for style, place in places.items()
        for name, (right, asked) in json.loads((place / _CEILING).read_text(encoding="utf-8")).items()
    }
    by_style = {style: AttributeReader.from_pretrained(place).eval().to(device) for style, place in places.items()}
    training = f"{drawings} fresh drawings of each style at {image_size} px, {passes} times each, seed {seed}"
    return AttributeReaders(by_style, ceiling, training)


def _ceiling(reader: AttributeReader, fresh: Avatars, style: str) -> dict[tuple[str, str], Found]:
    """What a reader reads right of the drawings of its style; the log says how much that is."""
    rows = _rows(fresh, style)
    shown = [{"style": style, **one} for one in reader.read(_pixels(fresh, rows))]
    found = attributes_found([fresh.attributes[row] for row in rows], shown)
    right, asked = (sum(getattr(one, name) for one in found.values()) for name in ("right", "asked"))
    least = min(found, key=lambda key: found[key].share)
    words = f"{right / asked:.1%} of what fresh drawings show, least the {least[1]} ({found[least].share:.0%})"
    logger.info("%s at %d px: the reader is right on %s", style, reader.config["image_size"], words)
    return found


def _rows(source: Avatars, style: str) -> Int[np.ndarray, " n"]:
    return np.flatnonzero(source.labels == source.class_names.index(style))


def _pixels(source: Avatars, rows: Int[np.ndarray, " b"]) -> Images:
    pixels = torch.from_numpy(np.stack([source.load(int(row)) for row in rows]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _trained(
    source: Avatars, style: str, passes: int, seed: int, device: torch.device, bar: Display
) -> AttributeReader:
    """A reader trained on the drawings of one style of a source."""
    members = _rows(source, style)
    known = [source.attributes[row] for row in members]
    values = {name: sorted({ABSENT, *(one[name] for one in known if name in one)}) for name in attribute_names(style)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = AttributeReader(values=values, image_size=source.load(0).shape[0]).to(device)
    shown = {
        name: torch.tensor([of_name.index(one.get(name, ABSENT)) for one in known], device=device)
        for name, of_name in reader.values.items()
    }
    orders = [stream(seed, ORDER, turn).permutation(len(members)) for turn in range(passes)]
    batches = [places for order in orders for places in np.array_split(order, -(-len(members) // _BATCH))]
    optimizer = torch.optim.AdamW(reader.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=len(batches))
    products = torch.autocast(device.type, torch.bfloat16) if faster_type(device).bf16 else nullcontext()
    for places in batches:
        with products:
            logits = reader(_pixels(source, members[places]).to(device))
        chosen = torch.from_numpy(places).to(device)
        losses = [F.cross_entropy(of_value.float(), shown[name][chosen]) for name, of_value in logits.items()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        bar.update(1)
    return reader.eval()
