import torch

from isthmus.data.avatars import Avatars
from isthmus.evaluation.attributes import AttributeReader, Found, attribute_reader, attributes_found


def test_a_reader_learns_what_drawings_show_and_is_kept(tmp_path):
    small = {"num_images": 512, "num_epochs": 12, "cache_dir": tmp_path}
    reader, ceiling = attribute_reader(16, ("gaze",), **small)
    assert ceiling["gaze", "body colour"].share > 0.9 and set(ceiling) == {
        ("gaze", name) for name in ("shape", "eyes", "spacing", "body colour")
    }
    again, same = attribute_reader(16, ("gaze",), **small)
    assert same == ceiling
    fresh = Avatars(("gaze",), image_size=16, split="reader-val", num_images=512, cache_dir=tmp_path)
    images = torch.stack([torch.from_numpy(fresh.load(i)) for i in range(len(fresh))]).permute(0, 3, 1, 2) / 127.5 - 1
    shown = again.read(images, ["gaze"] * len(fresh))
    assert attributes_found(fresh.attributes, shown) == ceiling
    assert again.read(images[3:4], ["gaze"]) == shown[3:4]


def test_only_what_was_asked_for_counts():
    asked = [{"style": "gaze", "shape": "egg"}, {"style": "gaze", "shape": "egg", "eyes": "dots"}]
    shown = [{"style": "gaze", "shape": "egg", "eyes": "big"}, {"style": "gaze", "eyes": "dots"}]
    assert attributes_found(asked, shown) == {("gaze", "shape"): Found(1, 2), ("gaze", "eyes"): Found(1, 1)}


def test_every_style_has_its_own_values():
    values = {"gaze": {"shape": ["", "egg"]}, "stack": {"cap": ["", "egg", "cube"], "piles": ["pair"]}}
    reader = AttributeReader(values=values, image_size=16, width=4)
    logits = reader(torch.zeros(2, 3, 16, 16), "stack")
    assert {name: tuple(rows.shape) for name, rows in logits.items()} == {"cap": (2, 3), "piles": (2, 1)}
