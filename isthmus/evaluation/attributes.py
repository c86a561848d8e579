"""Whether a drawing shows what its prompt asked for: a small network reads the attributes of avatars from pixels.

It is trained on fresh renders, which cost nothing, and kept in the cache. What it reads right on renders that it was
not trained on is the ceiling: nobody can be seen to do better.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.data.avatars import AVATAR_STYLES, Attributes, Avatars
from isthmus.display import Display
from isthmus.files import cache_directory, sha256_of_parts
from isthmus.nn.draws import ORDER, stream
from isthmus.nn.saved_model import SavedModel, records_arguments
from isthmus.nn.shapes import Images
from isthmus.pipelines.folder import written_whole

logger = logging.getLogger("isthmus")

ABSENT = ""
_BATCH = 64


class AttributeReader(SavedModel):
    """Convolutions over the pixels of a drawing, and for every style a choice among the values of each attribute.

    Args:
        values: style -> attribute -> what it can be, `ABSENT` ("") included.
        image_size: side of the drawings, in pixels.
        width: channels at the full size.
    """

    @records_arguments
    def __init__(self, *, values: Mapping[str, Mapping[str, Sequence[str]]], image_size: int, width: int = 32):
        super().__init__()
        widths = [12, width, 2 * width, 4 * width]
        self.trunk = nn.Sequential(nn.PixelUnshuffle(2))
        for before, after in pairwise(widths):
            self.trunk.append(nn.Conv2d(before, after, 3, stride=1 if before == 12 else 2, padding=1))
            self.trunk.append(nn.ReLU())
            self.trunk.append(nn.Conv2d(after, after, 3, padding=1))
            self.trunk.append(nn.ReLU())
        features = 4 * width * (image_size // 8) ** 2
        self.heads = nn.ModuleDict(
            {style: nn.Linear(features, sum(map(len, of_style.values()))) for style, of_style in values.items()}
        )

    def forward(self, images: Images, style: str) -> dict[str, Float[Tensor, "b values"]]:
        """Logits of the values of each attribute, by its name; all images are of one style."""
        # by name: a saved configuration has its keys in this order
        values = dict(sorted(self.config["values"][style].items()))
        logits = self.heads[style](self.trunk(images).flatten(1))
        return dict(zip(values, logits.split([len(known) for known in values.values()], dim=1), strict=True))

    @torch.no_grad()
    def read(self, images: Images, styles: Sequence[str]) -> list[Attributes]:
        """What drawings in [-1, 1] show, given their styles."""
        shown: list[Attributes] = [{"style": style} for style in styles]
        for style in dict.fromkeys(styles):
            rows = [row for row, other in enumerate(styles) if other == style]
            for first in range(0, len(rows), _BATCH):
                chosen = rows[first : first + _BATCH]
                for name, logits in self(images[chosen].to(self.device), style).items():
                    for row, index in zip(chosen, logits.argmax(dim=1).tolist(), strict=True):
                        if value := self.config["values"][style][name][index]:
                            shown[row][name] = value
        return shown


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


def attribute_reader(
    image_size: int,
    styles: Sequence[str] = AVATAR_STYLES,
    *,
    num_images: int = 20_000,
    num_epochs: int = 4,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> tuple[AttributeReader, dict[tuple[str, str], Found]]:
    """The reader of drawings of these styles at a size, and its ceiling: what it reads right of fresh renders.

    It is trained where the cache has none.
    """
    folder = cache_directory(cache_dir) / "attribute-readers"
    settings = sha256_of_parts(*styles, num_images, num_epochs, seed)[:12]
    place = folder / f"{image_size}px-{settings}"
    if not place.is_dir():
        folder.mkdir(exist_ok=True)
        train, fresh = (
            Avatars(styles, image_size=image_size, split=split, num_images=num_images, cache_dir=cache_dir)
            for split in ("reader", "reader-val")
        )
        reader = _trained(train, image_size, num_epochs, seed, device)
        ceiling = attributes_found(fresh.attributes, reader.read(_pixels(fresh, range(len(fresh))), _styles(fresh)))
        with written_whole(place) as temporary:
            reader.save_pretrained(temporary)
            rows = [[*key, found.right, found.asked] for key, found in ceiling.items()]
            (temporary / "ceiling.json").write_text(json.dumps(rows), encoding="utf-8")
    rows = json.loads((place / "ceiling.json").read_text(encoding="utf-8"))
    ceiling = {(style, name): Found(right, asked) for style, name, right, asked in rows}
    return AttributeReader.from_pretrained(place).to(device), ceiling


def _styles(source: Avatars) -> list[str]:
    return [source.class_names[label] for label in source.labels]


def _pixels(source: Avatars, indices: Sequence[int] | np.ndarray) -> Images:
    pixels = torch.from_numpy(np.stack([source.load(int(index)) for index in indices]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _trained(
    source: Avatars, image_size: int, num_epochs: int, seed: int, device: torch.device | str
) -> AttributeReader:
    """A reader trained on the drawings of a source; each batch is of one style."""
    values: dict[str, dict[str, list[str]]] = {style: defaultdict(list) for style in source.class_names}
    for shown in source.attributes:
        for name, value in shown.items():
            known = values[shown["style"]][name]
            if name != "style" and value not in known:
                known.append(value)
    values = {
        style: {name: sorted({ABSENT, *known}) for name, known in of_style.items() if name != "style"}
        for style, of_style in values.items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = AttributeReader(values=values, image_size=image_size).to(device)
    numbers = {
        style: {name: {value: i for i, value in enumerate(known)} for name, known in of_style.items()}
        for style, of_style in values.items()
    }
    members = [np.flatnonzero(source.labels == label) for label in range(source.num_classes)]
    batches = [
        (style, rows)
        for epoch in range(num_epochs)
        for style, own in zip(source.class_names, members, strict=True)
        for rows in np.array_split(
            stream(seed, ORDER, epoch, source.class_names.index(style)).permutation(own), -(-len(own) // _BATCH)
        )
    ]
    order = stream(seed, ORDER, num_epochs, source.num_classes).permutation(len(batches))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=len(batches))
    with Display("learning to read attributes", len(batches), "step") as bar:
        for index in order:
            style, rows = batches[index]
            logits = reader(_pixels(source, rows).to(device), style)
            losses = []
            for name, of_value in logits.items():
                shown = [numbers[style][name][source.attributes[row].get(name, ABSENT)] for row in rows]
                losses.append(F.cross_entropy(of_value, torch.tensor(shown, device=of_value.device)))
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
            bar.update(1)
    return reader.eval()
