"""What samples show of what they were asked for: real drawings show all that the reader sees, others are chance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.avatars import Attributes, attribute_names, combined_pairs, held_out_pairs
from isthmus.errors import UserError
from isthmus.evaluation import alignment
from isthmus.evaluation.alignment import (
    COMBINATIONS,
    RECONSTRUCTIONS,
    SEEDS,
    Alignment,
    AskedDrawings,
    AttributeTest,
    attribute_scores,
    attributes_to_read,
    held_out_combinations,
    worst_samples,
)
from isthmus.evaluation.attributes import AttributeReader, AttributeReaders
from isthmus.evaluation.classes import choose_classes, others_of_their_class
from isthmus.evaluation.images import ImageSet, some
from isthmus.evaluation.record import COMBINATION
from isthmus.evaluation.reference import DataSplits, open_splits
from tests.pipelines.tiny import tiny_pipeline, tiny_text_pipeline

STYLES, SIZE, NUM = ("gaze", "moods"), 8, 40


@pytest.fixture(scope="module", autouse=True)
def few_combinations():
    """Of ten drawings one has a combination that is held out: a thousand of them take half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "COMBINATIONS_LIMIT", 64)
        yield


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    return open_splits("avatars:gaze,moods", image_size=SIZE, classes=(), wanted=(), max_images=200)


@pytest.fixture(scope="module")
def asked(splits, few_combinations) -> list[AskedDrawings]:
    """20 drawings of held-out seeds, each twice, and 40 of held-out combinations."""
    names = [name for style in STYLES for name in attribute_names(style)]
    test = AttributeTest.of(splits, choose_classes(tiny_text_pipeline(), splits, NUM, "uniform"), names)
    return [test.seeds, test.combinations]


@pytest.fixture(scope="module")
def readers(asked) -> AttributeReaders:
    """Readers that know the values of these drawings and nothing else: what they read is a guess, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        by_style = {}
        for style in STYLES:
            known = [one for drawings in asked for one in drawings.attributes if one["style"] == style]
            values = {name: sorted({one.get(name, "") for one in known}) for name in attribute_names(style)}
            by_style[style] = AttributeReader(values=values, image_size=SIZE, width=4).eval()
    return AttributeReaders(by_style, {}, "not at all")


def names_of(asked: AskedDrawings) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for one in asked.attributes for name in one if name != "style"))


def told_right(asked: AskedDrawings) -> Alignment:
    """What a reader without error would see in samples that show all that they were asked for."""
    shown, others = asked.attributes, others_of_their_class(asked.source.labels)[asked.rows]
    return Alignment(asked, names_of(asked), shown, shown, [asked.source.attributes[other] for other in others], shown)


def test_drawings_themselves_show_what_the_reader_sees(asked, readers):
    for one in asked:
        drawings = Alignment.of_drawings(readers, one, names_of(one), darker)
        found = drawings.of_samples(readers, one.drawings, one)
        assert found.shown == found.real
        assert all(count.right == count.real for count in found.counts())
        # other drawings of the style are what chance is
        moved = replace(one, rows=others_of_their_class(one.source.labels)[one.rows])
        assert moved.labels.tolist() == one.labels.tolist() and all(moved.rows != one.rows)
        moved = drawings.of_samples(readers, moved.drawings, one)
        assert all(count.right == count.chance for count in moved.counts())


def darker(images: ImageSet) -> list[np.ndarray]:
    """What stands for a tokenizer here: it loses half of the light."""
    return [image // 2 for image in images]


def test_drawings_are_looked_at_once_and_as_they_are_rebuilt(asked, readers):
    seeds = asked[0]
    drawings = Alignment.of_drawings(readers, seeds, names_of(seeds), darker)
    assert len(drawings.asked) == 20 < len(seeds), "each is asked for twice"
    # samples that are the reconstructions show what the column of reconstructions says
    found = drawings.of_samples(readers, darker(seeds.drawings), seeds)
    assert found.shown == found.rebuilt and all(one.right == one.rebuilt for one in found.counts())
    assert all(one.rebuilt is None for one in drawings.counts()), "there they are what is right"
    ours, theirs = attribute_scores(found), attribute_scores(drawings, RECONSTRUCTIONS)
    assert [score.name for score in theirs] == [
        "attributes right, reconstructions",
        "combinations right, reconstructions",
    ]
    for once, twice in zip(theirs, ours, strict=True):
        assert (once.value, once.floor, once.ceiling) == pytest.approx((twice.value, twice.floor, twice.ceiling))
        assert once.images == 20 and once.high - once.low > twice.high - twice.low, "no more sure for repeated captions"
        assert f"{once.value:.1%} are found in reconstructions" in twice.note


def test_chance_stays_within_the_style_for_few_samples(asked, readers):
    """One drawing of each style: the other one is not among those that are asked for."""
    seeds = asked[0]
    few = replace(seeds, rows=np.array([seeds.rows[seeds.labels == label][0] for label in (0, 1)]))
    drawings = Alignment.of_drawings(readers, few, names_of(few), darker)
    assert [one["style"] for one in drawings.others] == [one["style"] for one in few.attributes] == list(STYLES)


def test_all_is_right_where_all_is_shown(asked):
    alignments = [told_right(one) for one in asked]
    scores = [score for one in alignments for score in attribute_scores(one)]
    assert [score.name for score in scores] == [
        f"{what} right, {prompts}" for prompts in (SEEDS, COMBINATIONS) for what in ("attributes", "combinations")
    ]
    for score in scores:
        assert score.value == score.floor == score.high == 1 and score.low < 1 and score.ceiling < 1
    assert worst_samples(alignments, [ImageSet("samples", "", None, (), NUM)] * 2) is None


def test_a_wrong_attribute_is_counted_where_it_was_asked_for(asked):
    seeds = asked[0]
    place = next(i for i, one in enumerate(seeds.attributes) if one["style"] == "gaze")
    wanted = seeds.attributes[place]
    shown: list[Attributes] = [*seeds.attributes]
    shown[place] = {name: value for name, value in wanted.items() if name != "shape"}
    found = replace(told_right(seeds), shown=shown)
    wrong = {(one.style, one.attribute): one.asked - one.right for one in found.counts() if one.asked > one.right}
    pairs = sum("shape" in pair for pair in combined_pairs(wanted))
    assert wrong == {("gaze", "shape"): 1, ("gaze", COMBINATION): pairs}
    assert found.wrong(place) == [("shape", wanted["shape"], "none")]
    # what was not asked for is not looked at
    colours = replace(found, names=("body colour",))
    assert {one.attribute for one in colours.counts()} == {"body colour"}
    assert all(one.right == one.asked for one in colours.counts())
    picture = worst_samples([found], [ImageSet("samples", "", None, (), NUM, at=lambda i: seeds.source.load(0))])
    assert picture is not None and picture.height < 200, "one row: nothing else is wrong"


def test_combinations_are_those_that_training_has_not(asked, splits):
    seeds, unseen = asked
    assert not any(held_out_pairs(one) for one in seeds.attributes)
    counted = [count for count in told_right(unseen).counts() if count.attribute == COMBINATION]
    assert sum(count.asked for count in counted) == sum(len(held_out_pairs(one)) for one in unseen.attributes) >= NUM
    few = held_out_combinations(STYLES, 7, image_size=SIZE)
    assert few.captions == unseen.captions[:7] and few.source.fingerprint == unseen.source.fingerprint
    assert sorted(set(unseen.labels.tolist())) == [0, 1]


def test_prompts_are_captions_of_the_samples_class(splits):
    captions, labels = splits.held_out.captions, splits.held_out.labels
    few, many = (choose_classes(tiny_text_pipeline(), splits, num, "uniform") for num in (6, NUM))
    assert few.prompts == many.prompts[:6] and few.rule == many.rule
    assert [captions[row] for row in many.rows] == list(many.prompts)
    assert [labels[row] for row in many.rows] == many.labels.tolist()
    assert sorted(many.rows.tolist()) == sorted([*range(20), *range(20)]), "each as often"
    assert many.names == STYLES and many.ids == () and many.words == "every class equally often"


def test_captions_stay_with_their_images(splits):
    whole = splits.held_out
    few = some(whole, 7)
    places = [next(i for i in range(len(whole)) if np.array_equal(whole.at(i), few.at(k))) for k in range(7)]
    assert [whole.captions[place] for place in places] == list(few.captions)


def test_images_without_words_are_no_prompts():
    labels = np.array([0, 0, 1, 1])
    held_out = ImageSet("val", "1", labels, ("a", "b"), 4, captions=["x", "", "", ""])
    data = DataSplits("folder:data", False, held_out, held_out, 4, "")
    chosen = choose_classes(tiny_text_pipeline(), data, 3, "uniform")
    assert chosen.prompts == ("x",) * 3 and chosen.labels.tolist() == [0, 0, 0]
    assert choose_classes(tiny_text_pipeline(), data, 3, "data").labels.tolist() == [0, 0, 0]
    for captions in (None, [""] * 4):
        empty = replace(data, held_out=replace(held_out, captions=captions))
        with pytest.raises(UserError, match="images with captions"):
            choose_classes(tiny_text_pipeline(), empty, 3, "uniform")


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30))
def test_each_image_is_another_ones(labels):
    others = others_of_their_class(np.array(labels))
    assert sorted(others) == list(range(len(labels))) and all(others != np.arange(len(labels)))
    if min(labels.count(one) for one in labels) > 1:
        assert [labels[other] for other in others] == labels


def test_which_attributes_are_read(splits):
    elsewhere = replace(splits, sources=None, spec="folder:data")
    assert attributes_to_read((), splits, reads_text=False) == attributes_to_read((), elsewhere, reads_text=True) == ()
    every = attributes_to_read((), splits, reads_text=True)
    assert every == attributes_to_read(("all",), splits, reads_text=False)
    assert {"shape", "eyes", "cheeks", "background colour"} <= set(every)
    assert attributes_to_read(("none",), splits, reads_text=True) == ()
    assert attributes_to_read(("eyes", "eyes"), splits, reads_text=True) == ("eyes",)
    for wanted, data, said in (
        (("eye",), splits, "Did you mean eyes"),
        (("all", "eyes"), splits, "stand alone"),
        (("eyes",), elsewhere, "attributes are those of avatars"),
    ):
        with pytest.raises(UserError, match=said):
            attributes_to_read(wanted, data, reads_text=True)
    chosen = choose_classes(tiny_pipeline(num_classes=0), splits, 4, "uniform")
    with pytest.raises(UserError, match="reads no text"):
        AttributeTest.of(splits, chosen, ("eyes",))
    classes = choose_classes(tiny_pipeline(num_classes=2, names=False), splits, 4, "uniform")
    told = choose_classes(tiny_text_pipeline(), splits, 4, "uniform")
    assert not classes.prompts
    rows = [AttributeTest.of(splits, one, ("eyes",)).seeds.rows.tolist() for one in (classes, told)]
    assert rows[0] == rows[1], "a model of classes is asked for the same drawings"
