import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.errors import UserError
from isthmus.pictures import save_picture, table, to_pil, to_uint8


def test_the_range_maps_to_all_levels_and_rounds():
    levels = torch.arange(256) / 127.5 - 1
    images = levels.view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_uint8(images)[0, :, :, 0].ravel(), np.arange(256))
    assert to_uint8(torch.full((1, 3, 1, 1), 7.0)).max() == 255


def test_a_table_holds_every_image_and_room_for_names():
    pictures = to_pil(torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 8, 8))
    plain = table([pictures, pictures[:2]])
    assert plain.size == (3 * 66, 2 * 66)
    assert plain.getpixel((10, 10)) == (0, 0, 0) and plain.getpixel((3 * 66 - 10, 80)) == (255, 255, 255)
    named = table([pictures], row_names=["a class"], column_names=["1 x 1", "2 x 2", "4 x 4"])
    assert named.width > 3 * 66 and named.height > 66


def test_a_picture_is_written_whole_with_its_text(tmp_path):
    path = save_picture(Image.new("RGB", (2, 2)), tmp_path / "new" / "one.png", {"label": "café ☕", "seed": "7"})
    with Image.open(path) as image:
        assert image.info["label"] == "café ☕" and image.info["seed"] == "7"
    with pytest.raises(UserError, match="could not write"):
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "new")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["one.png"] and len(list(tmp_path.iterdir())) == 1
