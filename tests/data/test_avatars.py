import numpy as np
import pytest

from isthmus.data.avatars import AVATAR_STYLES, Avatars, caption, drawing, held_out_pairs
from isthmus.errors import UserError

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
