from itertools import islice

import numpy as np
import pytest
import torch

from isthmus.data.avatars import (
    AVATAR_STYLES,
    Avatars,
    AvatarStream,
    StreamedAvatars,
    caption,
    drawing,
    held_out_pairs,
)
from isthmus.data.batches import CachedTokens, training_batches
from isthmus.data.opening import class_names, open_source
from isthmus.data.token_cache import TokenCache
from isthmus.errors import UserError
from tests.data.conftest import tiny_tokenizer

STYLES = ("gaze", "stack")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Two styles at 16 pixels, as many as one file of each holds."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, Avatars(STYLES, image_size=16, num_images=200, cache_dir=folder)


def test_a_drawing_follows_from_style_split_and_number(rendered):
    _, avatars = rendered
    assert len(avatars) == 200 and avatars.class_names == STYLES and avatars.labels[:4].tolist() == [0, 1, 0, 1]
    assert avatars.attributes[5] == drawing("stack", "train", 2)[1]
    assert avatars.load(5).shape == (16, 16, 3) and avatars.load(5).dtype == np.uint8
    assert not np.array_equal(avatars.load(5), avatars.load(7))


def test_drawings_are_rendered_once_and_again_where_they_are_damaged(rendered, caplog):
    folder, avatars = rendered
    files = sorted(folder.rglob("*.npy"))
    times = [file.stat().st_mtime_ns for file in files]
    again = Avatars(STYLES, image_size=16, num_images=200, cache_dir=folder)
    assert again.fingerprint == avatars.fingerprint and [file.stat().st_mtime_ns for file in files] == times
    before = files[0].read_bytes()
    files[0].write_bytes(before[:-1] + b"\x07")
    mended = Avatars(STYLES, image_size=16, num_images=200, cache_dir=folder)
    assert "damaged" in caplog.text and mended.fingerprint == avatars.fingerprint and files[0].read_bytes() == before


def test_fewer_styles_and_images_are_the_same_drawings(rendered):
    folder, avatars = rendered
    one = Avatars(("stack",), image_size=16, num_images=50, cache_dir=folder)
    assert len(one) == 50 and one.fingerprint != avatars.fingerprint
    for index in (0, 7):
        assert np.array_equal(one.load(index), avatars.load(2 * index + 1))
        assert one.captions[index] == avatars.captions[2 * index + 1]


def test_data_named_in_words_are_the_same(rendered):
    folder, avatars = rendered
    named = open_source("avatars:gaze,stack", image_size=16, max_images=200, cache_dir=folder)
    assert (
        named.fingerprint == avatars.fingerprint and named.name == "avatars:gaze,stack" and "CC0" in named.attribution
    )
    assert named.captions == [caption(attributes) for attributes in named.attributes]
    assert class_names("avatars:stack", image_size=16) == ("stack",)
    with pytest.raises(UserError, match="no style 'gase'. Did you mean gaze"):
        open_source("avatars:gase", image_size=16, cache_dir=folder)


def test_a_cache_keeps_the_caption_of_every_image(rendered, tmp_path):
    _, avatars = rendered
    options = {"image_size": 8, "seed": 0, "num_views": 2, "max_images": 50}
    cache = TokenCache.build(tmp_path / "tokens", tiny_tokenizer(), avatars, **options)
    assert cache.captions == list(avatars.captions[:50]) and cache.record["format"] == 1
    for batch in islice(training_batches(CachedTokens(cache, seed=3, balanced=True), batch_size=8), 8):
        for label, index in zip(batch["class_label"].tolist(), batch["index"].tolist(), strict=True):
            assert cache.captions[index] == avatars.captions[index] and label == avatars.labels[index]
    (cache.path / "captions.json").write_text("[]")
    with pytest.raises(UserError, match="no token cache that is whole"):
        TokenCache(cache.path)


def streamed(seed=5):
    return AvatarStream(STYLES, image_size=16, seed=seed)


def test_streamed_drawings_follow_from_seed_and_position():
    source = streamed()
    assert (source.class_names, source.name) == (STYLES, "avatars:gaze,stack")
    assert source.fingerprint == streamed().fingerprint != streamed(6).fingerprint
    whole = StreamedAvatars(source, image_size=16, seed=5, augment=source.augmentation)
    first, second = islice(training_batches(whole, batch_size=4, num_workers=0), 2)
    again = StreamedAvatars(streamed(), image_size=16, seed=5, augment=source.augmentation)
    parts = [
        next(training_batches(again, batch_size=4, start_position=4, rank=rank, world_size=2, num_workers=0))
        for rank in (0, 1)
    ]
    for name, rows in second.items():
        assert torch.equal(rows, torch.cat([part[name] for part in parts])), name
    assert first["class_label"].tolist() == [0, 1, 0, 1] and not torch.equal(first["image"], second["image"])
    assert torch.equal(first["image"][3], torch.tensor(source.image(3).image).permute(2, 0, 1) / 127.5 - 1)


def test_a_stream_fills_a_cache_with_captions(tmp_path):
    options = {"image_size": 8, "seed": 0, "max_images": 6, "batch_size": 4}
    cache = TokenCache.build(tmp_path / "tokens", tiny_tokenizer(), streamed(), **options)
    drawn = list(islice(streamed().images(), 6))
    assert cache.captions == [one.caption for one in drawn] and cache.labels.tolist() == [0, 1] * 3
    assert not any(held_out_pairs(drawing("gaze", "stream-5", i)[1]) for i in range(40))


def test_held_out_combinations_are_in_no_other_split():
    for style in AVATAR_STYLES:
        for split, held in [("train", False), ("val", False), ("combinations", True)]:
            assert bool(held_out_pairs(drawing(style, split, 3)[1])) == held


def test_captions_say_what_is_there_and_training_ones_leave_out():
    attributes = drawing("critters", "train", 0)[1]
    whole = caption(attributes)
    assert whole.startswith("a critter, ") and len(whole.split(", ")) == len(attributes)
    varied = {caption(attributes, np.random.default_rng(i)) for i in range(20)}
    assert len(varied) > 15
    for words in varied:
        assert words.startswith("a critter") and set(words.split(", ")) <= set(whole.split(", "))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"styles": ("avataaars",)}, "terms of its own"),
        ({"styles": ("critter",)}, "no style 'critter'. Choose among critters"),
        ({"styles": ("gaze", "gaze")}, "named once"),
        ({"image_size": 4}, "8 to 512 pixels, got 4"),
        ({"num_images": 9}, "--max-images"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        Avatars(**{"styles": STYLES, "image_size": 16, "split": "val", "cache_dir": tmp_path} | arguments)
    assert list(tmp_path.iterdir()) == []
