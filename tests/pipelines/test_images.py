import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.data.images import centre_view, decode_image
from isthmus.errors import UserError
from isthmus.pipelines.images import listed_images, to_images


def noise(height, width, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def test_a_picture_is_seen_as_evaluation_sees_it():
    for size, mode in itertools.product([(8, 8), (17, 9), (5, 31), (64, 48)], ["RGB", "RGBA", "L"]):
        picture, stored = noise(*size, mode), io.BytesIO()
        picture.save(stored, format="PNG")
        expected = centre_view(decode_image(stored.getvalue()), 8)
        (image,) = to_images(picture, 8)
        assert np.array_equal(image.add(1).mul(127.5).round().permute(1, 2, 0).numpy(), expected)


def test_several_pictures_and_tensors():
    pictures = [noise(9, 17), noise(8, 8)]
    both = to_images(pictures, 8)
    assert both.shape == (2, 3, 8, 8) and -1 <= both.min() and both.max() <= 1
    assert torch.equal(both[1:], to_images(pictures[1], 8))
    assert torch.equal(to_images(both, 8), both) and torch.equal(to_images(both[0], 8), both[:1])
    assert to_images(torch.zeros(3, 8, 12), 8).shape == (1, 3, 8, 12)
    mixed = to_images([both[0], pictures[1], both], 8)
    assert torch.equal(mixed, torch.cat([both, both]))


def test_what_is_no_image_is_refused_in_words():
    for images, said in [
        (["face.png"], "got str"),
        ("face.png", "got str"),
        (3, "got int"),
        (np.zeros((2, 8, 8, 3), np.uint8), "got ndarray"),
        ([noise(8, 8), np.zeros((8, 8, 3), np.uint8)], "got ndarray"),
        ([], "at least one"),
    ]:
        with pytest.raises(UserError, match=said):
            listed_images(images)
    for images, said in [
        ([], "at least one"),
        (torch.zeros(8, 8), r"\(b, 3, h, w\)"),
        (torch.zeros(1, 4, 8, 8), r"\(b, 3, h, w\)"),
        (torch.zeros(0, 3, 8, 8), r"\(b, 3, h, w\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "127.5"),
        (torch.full((1, 3, 8, 8), float("nan")), "finite"),
        (torch.full((1, 3, 8, 8), 255.0), r"\[-1, 1\], got 255"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 12)], "one size, got 12 x 8, 8 x 8"),
    ]:
        with pytest.raises(UserError, match=said):
            to_images(images, 8)
