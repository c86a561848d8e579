"""A reader of attributes is trained once, says how much it reads right, and reads one drawing as it reads many."""

import torch

from isthmus.data.avatars import AVATAR_STYLES, Avatars, attribute_names
from isthmus.evaluation.attributes import AttributeReader, Found, attribute_readers, attributes_found


def test_a_reader_learns_what_drawings_show_and_is_kept(tmp_path):
    small = {"drawings": 384, "passes": 6, "cache_dir": tmp_path}
    readers = attribute_readers(16, ("gaze",), **small)
    assert readers.ceiling["gaze", "body colour"].share > 0.9
    assert {name for _, name in readers.ceiling} == set(attribute_names("gaze"))
    again = attribute_readers(16, ("gaze",), **small)
    assert again.ceiling == readers.ceiling and again.facts() == readers.facts()
    fresh = Avatars(("gaze",), image_size=16, split="reader-val", num_images=2560, cache_dir=tmp_path)
    images = torch.stack([torch.from_numpy(fresh.load(i)) for i in range(len(fresh))]).permute(0, 3, 1, 2) / 127.5 - 1
    shown = again.read(images, ["gaze"] * len(fresh))
    assert attributes_found(fresh.attributes, shown) == readers.ceiling
    assert again.read(images[3:4], ["gaze"]) == shown[3:4]


def test_only_what_was_asked_for_counts():
    asked = [{"style": "gaze", "shape": "egg"}, {"style": "gaze", "shape": "egg", "eyes": "dots"}]
    shown = [{"style": "gaze", "shape": "egg", "eyes": "big"}, {"style": "gaze", "eyes": "dots"}]
    assert attributes_found(asked, shown) == {("gaze", "shape"): Found(1, 2), ("gaze", "eyes"): Found(1, 1)}


def test_drawings_of_any_size_are_read():
    values = {"cap": ["", "egg", "cube"], "piles": ["pair"]}
    for size in (8, 24, 32, 50):
        reader = AttributeReader(values=values, image_size=size, width=4).eval()
        logits = reader(torch.zeros(2, 3, size, size))
        assert {name: tuple(rows.shape) for name, rows in logits.items()} == {"cap": (2, 3), "piles": (2, 1)}
        assert all({"piles"} <= set(one) <= {"piles", "cap"} for one in reader.read(torch.zeros(2, 3, size, size)))


def test_every_attribute_of_a_drawing_can_be_asked_for():
    for style in AVATAR_STYLES:
        assert len(set(attribute_names(style))) == len(attribute_names(style))
