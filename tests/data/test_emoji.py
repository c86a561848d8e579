import logging
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from isthmus.data.emoji import (
    EMOJI_CLASSES,
    OPENMOJI_CLASSES,
    OpenMoji,
    Twemoji,
    emoji_table,
    held_out_bases,
    openmoji_table,
)
from isthmus.data.opening import open_source
from isthmus.errors import UserError

TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
SIZE = 8
SPLITS = ("train", "val")


def opened(cache_dir, **options):
    return open_source("openmoji", image_size=SIZE, cache_dir=cache_dir, **options)


def toneless(emoji) -> str:
    return "-".join(part for part in emoji.file.split("-") if part not in TONES)


def test_the_table_has_the_ten_classes():
    # counted in the label table when it was made: 2179 distinct drawings
    assert len(openmoji_table()) == 2179
    assert {emoji.class_name for emoji in openmoji_table()} == set(OPENMOJI_CLASSES)
    assert [emoji.file for emoji in openmoji_table()] == sorted(emoji.file for emoji in openmoji_table())


@pytest.mark.slow
def test_the_split_is_a_partition_of_every_class_in_which_tones_never_straddle(drawings_cache):
    train, val = (opened(drawings_cache, split=split) for split in ("train", "val"))
    assert {e.file for e in train.emojis} | {e.file for e in val.emojis} == {e.file for e in openmoji_table()}
    assert not {toneless(e) for e in train.emojis} & {toneless(e) for e in val.emojis}
    assert not {e.base for e in train.emojis} & {e.base for e in val.emojis}
    for name in OPENMOJI_CLASSES:
        bases = {e.base for e in openmoji_table() if e.class_name == name}
        assert len(held_out_bases(openmoji_table(), name, 0.1)) == round(0.1 * len(bases))


def test_a_subset_of_classes_keeps_the_split(drawings_cache):
    everything = opened(drawings_cache, split="val")
    some = opened(drawings_cache, split="val", classes=("hand", "face"))
    assert some.class_names == ("hand", "face")
    assert {e.file for e in some.emojis} == {e.file for e in everything.emojis if e.class_name in ("hand", "face")}
    assert all(some.class_names[label] == e.class_name for label, e in zip(some.labels, some.emojis, strict=True))


def test_flags_symbols_and_times_are_not_mirrored(drawings_cache):
    source = opened(drawings_cache)
    kept = {name for name, flip in zip(source.class_names, source.flip, strict=True) if not flip}
    assert kept == {"flag", "symbol", "sky_time"}
    assert source.balanced and "OpenMoji" in source.attribution


def test_drawings_lie_on_white_and_show_what_they_are(drawings_cache):
    source = opened(drawings_cache)
    images = np.stack([source.load(i) for i in range(len(source))])
    assert images.shape == (len(source), SIZE, SIZE, 3) and images.dtype == np.uint8
    assert np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]]) == 255
    # faces are yellow, red and green strong and blue weak
    faces = images[source.labels == source.class_names.index("face")]
    red, green, blue = np.median(faces[:, SIZE // 2, SIZE // 2], axis=0)
    assert min(red, green) > 150 and blue < 120


def test_drawn_once_then_read(drawings_cache):
    path, digest = OpenMoji.rendered(SIZE, drawings_cache)
    before = path.stat().st_mtime_ns
    assert OpenMoji.rendered(SIZE, drawings_cache) == (path, digest)
    assert path.stat().st_mtime_ns == before
    assert not list(drawings_cache.glob(".*"))


@pytest.mark.slow
def test_a_damaged_cache_is_drawn_again(drawings_cache, tmp_path, caplog):
    OpenMoji.rendered(SIZE, drawings_cache)
    shutil.copytree(drawings_cache, tmp_path / "copy")
    path, digest = OpenMoji.rendered(SIZE, tmp_path / "copy")
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert OpenMoji.rendered(SIZE, tmp_path / "copy")[1] == digest
        assert "damaged" in caplog.text and path.read_bytes() == whole


@pytest.mark.slow
def test_two_processes_may_draw_at_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(OpenMoji.rendered, [SIZE, SIZE], [tmp_path, tmp_path]))
    assert results[0] == results[1]
    assert OpenMoji(image_size=SIZE, cache_dir=tmp_path).load(0).shape == (SIZE, SIZE, 3)


def test_refusals(drawings_cache):
    with pytest.raises(UserError, match="no class 'faec'.*Did you mean face"):
        opened(drawings_cache, classes=("faec",))
    with pytest.raises(UserError, match="8 to 1024 pixels, got 4"):
        open_source("openmoji", image_size=4, cache_dir=drawings_cache)


def test_emoji_are_named_and_their_concepts_stay_together(drawings_cache):
    train, val = (open_source("emoji", image_size=SIZE, cache_dir=drawings_cache, split=split) for split in SPLITS)
    assert isinstance(train, Twemoji) and train.class_names == EMOJI_CLASSES
    assert "CC BY 4.0" in train.attribution
    # counted when the table was made
    assert len(train) + len(val) == len(emoji_table()) == 2067
    assert not {emoji.base for emoji in train.emojis} & {emoji.base for emoji in val.emojis}
    said = dict(zip((emoji.file for emoji in emoji_table()), (emoji.caption for emoji in emoji_table()), strict=True))
    assert said["1f34b"] == "lemon, food and drink"
    assert said["1f44b-1f3ff"] == "waving hand, dark skin tone, people and body"
    assert list(val.captions) == [said[emoji.file] for emoji in val.emojis]


def test_a_concept_is_an_emoji_in_every_tone_and_gender():
    bases = {emoji.file: emoji.base for emoji in emoji_table()}
    assert bases["1f44b"] == bases["1f44b-1f3ff"]
    assert bases["1f468-200d-2695-fe0f"] == bases["1f469-200d-2695-fe0f"] == bases["1f9d1-200d-2695-fe0f"]
    assert bases["1f926-200d-2640-fe0f"] == bases["1f926"]
    assert len(set(bases.values())) > 1500


def test_a_drawing_of_emoji_shows_what_its_caption_says(drawings_cache):
    source = open_source("emoji", image_size=SIZE, cache_dir=drawings_cache, val_fraction=0.0)
    place = {caption: i for i, caption in enumerate(source.captions)}
    for channel, colour in enumerate(("red", "green", "blue")):
        assert source.load(place[f"{colour} square, symbols"])[SIZE // 2, SIZE // 2].argmax() == channel
