"""Whether samples show what they were asked for: attributes of avatars that a reader finds in them.

Samples are asked for the attributes of real drawings, by their captions. The reader looks at the samples and at those
drawings themselves, which is as right as anybody can be seen to be, and at drawings of other captions, which is chance.
It also looks at what the model's own tokenizer makes of those drawings: a prior can hardly show what its tokens lose.
Asked for twice: on held-out seeds, whose pairs of attributes training has seen, and on held-out combinations, each with
a pair that no training image has.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, zip_longest

import numpy as np
from jaxtyping import Int
from PIL import Image

from isthmus.data.avatars import Attributes, Avatars, attribute_names, caption, combined_pairs, held_out_pairs
from isthmus.errors import UserError, nearest
from isthmus.evaluation.attributes import AttributeReaders, attribute_readers
from isthmus.evaluation.classes import SampleClasses, images_in_turn, others_of_their_class
from isthmus.evaluation.held_out import as_floats, rebuilt
from isthmus.evaluation.images import ImageSet, Picture
from isthmus.evaluation.record import COMBINATION, AttributeCount, Readings, Score
from isthmus.evaluation.reference import DataSplits
from isthmus.evaluation.scores import mean_score
from isthmus.evaluation.statistics import wilson_interval
from isthmus.pictures import table
from isthmus.pipelines.loading import AnyPipeline

SEEDS, COMBINATIONS = "held-out seeds", "held-out combinations"
RECONSTRUCTIONS = "reconstructions"
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

    @property
    def drawings(self) -> ImageSet:
        """The drawings themselves, one for each sample."""
        return ImageSet(self.source.name, "", None, (), len(self), at=lambda i: self.source.load(int(self.rows[i])))

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
        others: what it sees in another drawing of the style.
        rebuilt: what it sees in each drawing that the model's tokenizer has rebuilt; None where these are the samples.
    """

    asked: AskedDrawings
    names: tuple[str, ...]
    shown: Sequence[Attributes]
    real: Sequence[Attributes]
    others: Sequence[Attributes]
    rebuilt: Sequence[Attributes] | None = None

    @classmethod
    def of_drawings(
        cls,
        readers: AttributeReaders,
        asked: AskedDrawings,
        names: Sequence[str],
        rebuild: Callable[[ImageSet], Iterable[Picture]],
    ) -> "Alignment":
        """Look at drawings, each once, and as `rebuild` gives them back: those are the samples here."""
        source, rows = asked.source, np.unique(asked.rows)
        # of the whole split: of few samples a style may have one
        others = others_of_their_class(source.labels)[rows]
        looked_at = np.union1d(rows, others)
        seen = _read(readers, replace(asked, rows=looked_at))
        once = replace(asked, rows=rows)
        shown = _read(readers, once, rebuild(once.drawings))
        real, chance = ([seen[place] for place in np.searchsorted(looked_at, some)] for some in (rows, others))
        return cls(once, tuple(names), shown, real, chance)

    def of_samples(self, readers: AttributeReaders, images: Iterable[Picture], asked: AskedDrawings) -> "Alignment":
        """Look at samples (0..255), one for each drawing that was asked for; these drawings were looked at here."""
        places = np.searchsorted(self.asked.rows, asked.rows)
        real, others, rebuilt = ([seen[place] for place in places] for seen in (self.real, self.others, self.shown))
        return Alignment(asked, self.names, _read(readers, asked, images), real, others, rebuilt)

    def counts(self) -> list[AttributeCount]:
        """By style and attribute, and of combinations, in the order of captions."""
        found: dict[tuple[str, str], list[list[bool]]] = {}
        looked = (self.shown, self.real, self.others, *([] if self.rebuilt is None else [self.rebuilt]))
        for wanted, *seen in zip(self.asked.attributes, *looked, strict=True):
            names = [name for name in wanted if name in self.names]
            pairs = [pair for pair in self.asked.combinations(wanted) if set(pair) <= set(self.names)]
            for name, parts in [*((name, (name,)) for name in names), *((COMBINATION, pair) for pair in pairs)]:
                right = [all(one.get(part) == wanted[part] for part in parts) for one in seen]
                found.setdefault((wanted["style"], name), []).append(right)
        made = []
        for style in self.asked.source.class_names:
            for name in (*attribute_names(style), COMBINATION):
                if hits := found.get((style, name)):
                    right, real, chance, *rebuilt = np.sum(hits, axis=0).tolist()
                    made.append(
                        AttributeCount(
                            prompts=self.asked.prompts,
                            style=style,
                            attribute=name,
                            asked=len(hits),
                            right=right,
                            real=real,
                            chance=chance,
                            rebuilt=rebuilt[0] if rebuilt else None,
                        )
                    )
        return made

    def wrong(self, place: int) -> list[tuple[str, str, str]]:
        """Name, value asked for and value shown of the attributes that a sample gets wrong."""
        wanted, seen = self.asked.attributes[place], self.shown[place]
        pairs = [(name, value) for name, value in wanted.items() if name in self.names]
        return [(name, value, seen.get(name, "none")) for name, value in pairs if seen.get(name) != value]


def _read(readers: AttributeReaders, asked: AskedDrawings, images: Iterable[Picture] | None = None) -> list[Attributes]:
    """What images show, one for each drawing that is asked for; None are these drawings."""
    source, shown = iter(asked.drawings if images is None else images), []
    styles = [one["style"] for one in asked.attributes]
    while batch := list(islice(source, _AT_ONCE)):
        shown += readers.read(as_floats(np.stack(batch)), styles[len(shown) : len(shown) + len(batch)])
    return shown


def attribute_scores(one: Alignment, of: str = "") -> list[Score]:
    """Attributes right and combinations right, with Wilson's intervals.

    `of` says of what, in the names of the scores; without it stands the kind of prompts.
    """
    counts, scores = one.counts(), []
    for what, together in (("attributes", False), ("combinations", True)):
        chosen = [count for count in counts if (count.attribute == COMBINATION) == together]
        asked, right, real, chance = (
            sum(getattr(count, name) for count in chosen) for name in ("asked", "right", "real", "chance")
        )
        if not asked:
            continue
        if one.rebuilt is None:
            looked_at = "the real drawings of these captions after the tokenizer has rebuilt them: what its tokens keep"
        else:
            kept = sum(count.rebuilt or 0 for count in chosen) / asked
            looked_at = f"{kept:.1%} are found in reconstructions of the real drawings: what the tokens keep"
        note = (
            f"{asked:,} {what} asked for; {looked_at}; floor: what the reader finds in the real drawings of these "
            "captions, ceiling: in those of other captions"
        )
        share = wilson_interval(right, asked)
        name = f"{what} right, {of or one.asked.prompts}"
        ends = {"floor": real / asked, "ceiling": chance / asked}
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
        scores: of both kinds of prompts, and of reconstructions of the drawings of held-out seeds.
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
        self,
        pipeline: AnyPipeline,
        samples: Mapping[str, ImageSet],
        combinations: ImageSet,
        *,
        batch_size: int | None = None,
    ) -> AttributesRead:
        """Look at samples, those that were asked for first, then those of a sweep by guidance.

        `batch_size` drawings at once are rebuilt from their tokens, see `rebuilt`. Raises UserError as that does.
        """
        size, _ = combinations.size()
        readers = attribute_readers(size, self.seeds.source.class_names, device=pipeline.device)
        rebuild = partial(rebuilt, pipeline, batch_size=batch_size, title="reconstructions of the drawings asked for")
        drawings, of_pairs = (
            Alignment.of_drawings(readers, asked, self.names, rebuild) for asked in (self.seeds, self.combinations)
        )
        first, *others = (drawings.of_samples(readers, images, self.seeds) for images in samples.values())
        unseen = of_pairs.of_samples(readers, combinations, self.combinations)
        swept = zip(list(samples)[1:], others, strict=True)
        scores = [*attribute_scores(first), *attribute_scores(drawings, RECONSTRUCTIONS), *attribute_scores(unseen)]
        return AttributesRead(
            Readings(reader=readers.facts(), attributes=self.names, counts=(*first.counts(), *unseen.counts())),
            tuple(scores),
            {words: tuple(attribute_scores(one)) for words, one in swept},
            worst_samples((first, unseen), (next(iter(samples.values())), combinations)),
        )
