"""Whether samples show what they were asked for: attributes of avatars that a reader finds in them.

Samples are asked for the attributes of real drawings, by their captions. The reader looks at the samples and at those
drawings themselves, which is as right as anybody can be seen to be, and at drawings of other captions, which is chance.
Asked for twice: on held-out seeds, whose pairs of attributes training has seen, and on held-out combinations, each with
a pair that no training image has.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from isthmus.data.avatars import Attributes, Avatars, attribute_names, caption, combined_pairs, held_out_pairs
from isthmus.errors import UserError, nearest
from isthmus.evaluation.attributes import AttributeReaders, attribute_readers
from isthmus.evaluation.classes import SampleClasses, images_in_turn, others_of_their_class
from isthmus.evaluation.held_out import as_floats
from isthmus.evaluation.images import ImageSet, Picture
from isthmus.evaluation.record import COMBINATION, AttributeCount, Readings, Score
from isthmus.evaluation.reference import DataSplits
from isthmus.evaluation.scores import mean_score
from isthmus.evaluation.statistics import wilson_interval
from isthmus.pictures import table

SEEDS, COMBINATIONS = "held-out seeds", "held-out combinations"
COMBINATIONS_LIMIT = 1_000
"""Samples that are drawn for held-out combinations: as many as of held-out seeds, at most so many."""
ALL, NONE = "all", "none"

_AT_ONCE = 128
_WORST, _WRONG_NAMED = 12, 3


@dataclass(frozen=True, eq=False)
class AskedDrawings:
    """The drawings whose attributes samples are asked for.

    Attributes:
        prompts: `SEEDS` or `COMBINATIONS`.
        source: the split that they are of.
        rows: for each sample the number of a drawing.
    """

    prompts: str
    source: Avatars
    rows: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def attributes(self) -> list[Attributes]:
        """What each sample is asked to show."""
        return [self.source.attributes[row] for row in self.rows]

    @property
    def captions(self) -> list[str]:
        """The same in words, as a prompt."""
        return [caption(one) for one in self.attributes]

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The style of each, as a class of the source."""
        return self.source.labels[self.rows]

    def combinations(self, asked: Attributes) -> list[tuple[str, str]]:
        """The pairs of attributes that count together: on held-out combinations those that training has not seen."""
        return held_out_pairs(asked) if self.prompts == COMBINATIONS else combined_pairs(asked)


def held_out_combinations(styles: Sequence[str], number: int, *, image_size: int) -> AskedDrawings:
    """At most `COMBINATIONS_LIMIT` drawings with a pair of attributes that no training image has, all styles in turn.

    They are drawn where the cache has not got them; the first are the same for any number.
    """
    # of avatars, what is not trained on is a tenth
    images = 10 * max(COMBINATIONS_LIMIT, len(styles))
    source = Avatars(styles, image_size=image_size, split="combinations", num_images=images)
    return AskedDrawings(COMBINATIONS, source, np.arange(min(number, COMBINATIONS_LIMIT)))


def avatars_of(data: DataSplits) -> Avatars | None:
    """The held-out drawings of a data set; None where it is no avatars."""
    held_out = None if data.sources is None else data.sources[1]
    return held_out if isinstance(held_out, Avatars) else None


def attributes_to_read(wanted: Sequence[str], data: DataSplits, *, reads_text: bool) -> tuple[str, ...]:
    """Names of the attributes that are read from samples of a model; none where nothing is read.

    Args:
        wanted: names, `ALL` or `NONE`; nothing is `ALL` for a model that reads text and avatars, else `NONE`.
        data: what it is judged on.
        reads_text: whether samples are drawn from captions.

    Raises UserError for attributes that the drawings do not have, and for data whose attributes nobody knows.
    """
    source, listed = avatars_of(data), list(dict.fromkeys(wanted))
    if not listed:
        listed = [ALL if reads_text and source is not None else NONE]
    if listed == [NONE]:
        return ()
    if source is None:
        raise UserError(
            f"attributes are those of avatars, which are known, got {', '.join(listed)} for {data.spec}. Leave out "
            "--attributes."
        )
    known = list(dict.fromkeys(name for style in source.class_names for name in attribute_names(style)))
    if listed == [ALL]:
        return tuple(known)
    for name in listed:
        if name not in known:
            raise UserError(
                f"{data.spec} has no attribute {name!r}.{nearest(name, known)} Choose among {', '.join(known)}; all or "
                "none stand alone."
            )
    return tuple(listed)


@dataclass(frozen=True, eq=False)
class Alignment:
    """What was asked for and what was read.

    Attributes:
        asked: the drawings that samples were asked to show.
        names: attributes that count.
        shown: what the reader sees in each sample.
        real: what it sees in each drawing itself.
        others: what it sees in the drawing of another caption of the style.
    """

    asked: AskedDrawings
    names: tuple[str, ...]
    shown: Sequence[Attributes]
    real: Sequence[Attributes]
    others: Sequence[Attributes]

    @classmethod
    def read(
        cls, readers: AttributeReaders, images: Iterable[Picture], asked: AskedDrawings, names: Sequence[str]
    ) -> "Alignment":
        """Look at samples, one (0..255) for each drawing that was asked for, and at those drawings."""
        attributes = asked.attributes
        shown = _read(readers, images, [one["style"] for one in attributes])
        rows, places = np.unique(asked.rows, return_inverse=True)
        pictures = (asked.source.load(int(row)) for row in rows)
        real = _read(readers, pictures, [asked.source.attributes[row]["style"] for row in rows])
        # among the drawings: samples that were asked for the same one are no others
        others = others_of_their_class(asked.source.labels[rows])[places]
        return cls(asked, tuple(names), shown, [real[place] for place in places], [real[other] for other in others])

    def counts(self) -> list[AttributeCount]:
        """By style and attribute, and of combinations, in the order of captions."""
        found: dict[tuple[str, str], list[list[bool]]] = {}
        for place, wanted in enumerate(self.asked.attributes):
            seen = (self.shown[place], self.real[place], self.others[place])
            names = [name for name in wanted if name in self.names]
            pairs = [pair for pair in self.asked.combinations(wanted) if set(pair) <= set(self.names)]
            for name, parts in [*((name, (name,)) for name in names), *((COMBINATION, pair) for pair in pairs)]:
                right = [all(one.get(part) == wanted[part] for part in parts) for one in seen]
                found.setdefault((wanted["style"], name), []).append(right)
        made = []
        for style in self.asked.source.class_names:
            for name in (*attribute_names(style), COMBINATION):
                if hits := found.get((style, name)):
                    right, real, chance = np.sum(hits, axis=0).tolist()
                    made.append(
                        AttributeCount(
                            prompts=self.asked.prompts,
                            style=style,
                            attribute=name,
                            asked=len(hits),
                            right=right,
                            real=real,
                            chance=chance,
                        )
                    )
        return made

    def wrong(self, place: int) -> list[tuple[str, str, str]]:
        """Name, value asked for and value shown of the attributes that a sample gets wrong."""
        wanted, seen = self.asked.attributes[place], self.shown[place]
        pairs = [(name, value) for name, value in wanted.items() if name in self.names]
        return [(name, value, seen.get(name, "none")) for name, value in pairs if seen.get(name) != value]


def _read(readers: AttributeReaders, images: Iterable[Picture], styles: Sequence[str]) -> list[Attributes]:
    source, shown = iter(images), []
    while batch := list(islice(source, _AT_ONCE)):
        shown += readers.read(as_floats(np.stack(batch)), styles[len(shown) : len(shown) + len(batch)])
    return shown


def attribute_scores(alignments: Sequence[Alignment]) -> list[Score]:
    """Attributes right and combinations right, with Wilson's intervals, on each kind of prompts that was asked."""
    scores = []
    for one in alignments:
        counts, prompts = one.counts(), one.asked.prompts
        for what, together in (("attributes", False), ("combinations", True)):
            chosen = [count for count in counts if (count.attribute == COMBINATION) == together]
            asked, right, real, chance = (
                sum(getattr(count, name) for count in chosen) for name in ("asked", "right", "real", "chance")
            )
            if asked:
                note = (
                    f"{asked:,} {what} asked for; floor: what the reader finds in the real drawings of these captions, "
                    "ceiling: in those of other captions"
                )
                share = wilson_interval(right, asked)
                ends = {"floor": real / asked, "ceiling": chance / asked}
                name = f"{what} right, {prompts}"
                scores.append(mean_score(name, share, len(one.asked), "higher", note=note, **ends))
    return scores


def worst_samples(alignments: Sequence[Alignment], images: Sequence[ImageSet]) -> Image.Image | None:
    """Samples with the largest share of attributes wrong, each style in turn, beside the drawings of their captions.

    `images` are those of each alignment, and can be read one by one. None where nothing is wrong.
    """
    ranked: dict[str, list[tuple[float, int, int]]] = {}
    for which, one in enumerate(alignments):
        for place, wanted in enumerate(one.asked.attributes):
            if wrong := one.wrong(place):
                asked = sum(name in wanted for name in one.names)
                ranked.setdefault(wanted["style"], []).append((-len(wrong) / asked, which, place))
    turns = zip_longest(*(sorted(of_style) for of_style in ranked.values()))
    chosen = [one for turn in turns for one in turn if one is not None][:_WORST]
    if not chosen:
        return None
    rows, names = [], []
    for _, which, place in chosen:
        one, at = alignments[which], images[which].at
        assert at is not None, "a folder of samples is read one by one"
        drawing = one.asked.source.load(int(one.asked.rows[place]))
        rows.append([Image.fromarray(at(place)), Image.fromarray(drawing)])
        names.append(_words(one.asked.attributes[place], one.wrong(place)))
    return table(rows, row_names=names, column_names=["sample", "drawing"])


def _words(asked: Attributes, wrong: Sequence[tuple[str, str, str]]) -> str:
    """What a sample was asked to show and what was read instead, as far as it fits beside a picture."""
    named = [f"{value} {name.removesuffix(' colour')}: {seen}" for name, value, seen in wrong[:_WRONG_NAMED]]
    more = [f"and {len(wrong) - _WRONG_NAMED} more"] if len(wrong) > _WRONG_NAMED else []
    return "; ".join([asked["style"], *named, *more])


@dataclass(frozen=True, eq=False)
class AttributesRead:
    """What was found in the samples of an evaluation.

    Attributes:
        scores: of both kinds of prompts.
        sweep: those on held-out seeds by guidance.
        worst: a picture, see `worst_samples`.
    """

    readings: Readings
    scores: tuple[Score, ...]
    sweep: dict[str, tuple[Score, ...]]
    worst: Image.Image | None


@dataclass(frozen=True, eq=False)
class AttributeTest:
    """What the samples of an evaluation are asked for.

    Attributes:
        names: attributes that are read.
        seeds: of the samples that are scored in every other way too.
        combinations: of samples that are drawn for this alone.
    """

    names: tuple[str, ...]
    seeds: AskedDrawings
    combinations: AskedDrawings

    @classmethod
    def of(cls, data: DataSplits, chosen: SampleClasses, names: Sequence[str]) -> "AttributeTest":
        """The test of samples with these classes and prompts on a data set of avatars; combinations are drawn.

        A model of classes is asked for what it is not told: one of the drawings of its class. Raises UserError for a
        model of neither classes nor texts.
        """
        source = avatars_of(data)
        if not chosen.names:
            raise UserError(
                f"attributes are looked for in samples of a style, got {', '.join(names[:3])} for a model without "
                "classes that reads no text. Leave out --attributes."
            )
        assert source is not None, "only what avatars show is known"
        rows = images_in_turn(chosen.labels, source.labels) if chosen.rows is None else chosen.rows
        size, _ = data.held_out.size()
        unseen = held_out_combinations(source.class_names, len(rows), image_size=size)
        return cls(tuple(names), AskedDrawings(SEEDS, source, rows), unseen)

    def read(
        self, samples: Mapping[str, ImageSet], combinations: ImageSet, *, device: torch.device | str
    ) -> AttributesRead:
        """Look at samples, those that were asked for first, then those of a sweep by guidance."""
        size, _ = combinations.size()
        readers = attribute_readers(size, self.seeds.source.class_names, device=device)
        first, *others = (Alignment.read(readers, images, self.seeds, self.names) for images in samples.values())
        unseen = Alignment.read(readers, combinations, self.combinations, self.names)
        swept = zip(list(samples)[1:], others, strict=True)
        both = (first, unseen)
        counts = tuple(count for one in both for count in one.counts())
        return AttributesRead(
            Readings(reader=readers.facts(), attributes=self.names, counts=counts),
            tuple(attribute_scores(both)),
            {words: tuple(attribute_scores([one])) for words, one in swept},
            worst_samples(both, (next(iter(samples.values())), combinations)),
        )
