"""One reader for pictures: whichever door they come through, they come out the same."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from isthmus.data.images import Augmentation, augmented_view, centre_view, decode_image
from isthmus.errors import UserError
from isthmus.next_scale.canvas import open_images, to_masks
from isthmus.pictures import heat_map
from isthmus.pipelines.images import to_images
from isthmus.rgb import MAX_ASPECT, scaled_crop, shorter_side_to, upright_rgb

NOISE = np.random.default_rng(0).integers(0, 256, (12, 9, 4), dtype=np.uint8)
DEEP = NOISE[..., 0].astype(np.uint16) * 257


def oriented(orientation: int) -> dict:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return {"exif": tags}


def palette(picture: Image.Image) -> Image.Image:
    return picture.quantize(16)


# name -> (picture, format that keeps it, options of the format)
PICTURES = {
    "RGB": (Image.fromarray(NOISE[..., :3]), "PNG", {}),
    "RGBA": (Image.fromarray(NOISE), "PNG", {}),
    "L": (Image.fromarray(NOISE[..., 0]), "PNG", {}),
    "LA": (Image.fromarray(NOISE).convert("LA"), "PNG", {}),
    "1": (Image.fromarray(NOISE[..., 0] > 99), "PNG", {}),
    "P": (palette(Image.fromarray(NOISE[..., :3])), "PNG", {}),
    "P, one colour transparent": (palette(Image.fromarray(NOISE[..., :3])), "PNG", {"transparency": 3}),
    "L, one grey transparent": (Image.fromarray(NOISE[..., 0]), "PNG", {"transparency": int(NOISE[0, 0, 0])}),
    "CMYK": (Image.fromarray(NOISE[..., :3]).convert("CMYK"), "TIFF", {}),
    "16 bits": (Image.fromarray(DEEP), "PNG", {}),
    "16 bits, TIFF": (Image.fromarray(DEEP), "TIFF", {}),
    "32 bits": (Image.fromarray(DEEP.astype(np.int32)), "TIFF", {}),
    "float": (Image.fromarray(NOISE[..., 0].astype(np.float32) / 255), "TIFF", {}),
    "rotated": (Image.fromarray(NOISE[..., :3]), "PNG", oriented(6)),
    "rotated 16 bits": (Image.fromarray(DEEP), "PNG", oriented(8)),
    "YCbCr": (Image.fromarray(NOISE[..., :3]).convert("YCbCr"), "TIFF", {}),
}


def test_every_door_gives_the_same_pixels():
    for name, (picture, kind, options) in PICTURES.items():
        stored = io.BytesIO()
        picture.save(stored, format=kind, **options)
        decoded = decode_image(stored.getvalue())
        opened = Image.open(io.BytesIO(stored.getvalue()))
        assert np.array_equal(np.asarray(upright_rgb(opened)), decoded), name
        if not options:  # those belong to the file
            assert np.array_equal(np.asarray(upright_rgb(picture)), decoded), name
        assert opened.mode == Image.open(io.BytesIO(stored.getvalue())).mode, "the caller's picture stays as it is"
        as_tensor = torch.from_numpy(decoded.copy()).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(open_images(opened)[0][0], as_tensor), name
        square = torch.from_numpy(centre_view(decoded, 8)).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(to_images(opened, 8)[0], square), name
        if decoded.min() < 128 < decoded.max():
            grey = np.asarray(Image.fromarray(decoded).convert("L"))
            assert np.array_equal(to_masks(opened)[0][0, 0].numpy(), grey > 127), name
        shown, wanted = (heat_map(one, np.zeros((2, 2))) for one in (opened, Image.fromarray(decoded)))
        assert np.array_equal(np.asarray(shown), np.asarray(wanted)), name


def test_transparency_lies_on_white_in_every_band():
    tall = np.zeros((1500, 1000, 4), dtype=np.uint8)
    tall[::2, :, 3] = 255
    found = np.asarray(upright_rgb(Image.fromarray(tall)))
    assert (found[::2] == 0).all() and (found[1::2] == 255).all()


def test_what_is_no_picture_is_said():
    for picture, said in [
        (Image.fromarray(np.full((4, 4), 3.5, np.float32)), r"lie outside 0\.\.1"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), r"lie outside 0\.\.1"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), r"lie outside 0\.\.65535"),
        (Image.new("RGB", (0, 4)), "0 x 4"),
        (Image.new("RGB", (MAX_ASPECT * 4 + 1, 4)), "times as long.*Crop it"),
    ]:
        for door in (upright_rgb, lambda one: to_images(one, 8), open_images, to_masks):
            with pytest.raises(UserError, match=said):
                door(picture)
    stored = io.BytesIO()
    Image.fromarray(NOISE[..., :3]).resize((64, 64)).save(stored, format="PNG")
    with pytest.raises(UserError, match="cannot be read"):
        to_images(Image.open(io.BytesIO(stored.getvalue()[:400])), 8)


@pytest.mark.parametrize(
    ("width", "height", "side"), [(700, 40, 16), (40, 700, 64), (1999, 20, 64), (9, 200, 16), (3, 300, 64)]
)
def test_a_strip_is_cut_before_it_is_scaled(width, height, side):
    """The same pixels, whichever place of it is cut out, up to the rounding between the two passes of scaling."""
    # far from black and white: nothing overshoots, whichever pass comes first
    pixels = np.random.default_rng(0).integers(80, 176, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    scaled = shorter_side_to(width, height, side)
    whole = picture.resize(scaled, Image.Resampling.LANCZOS)
    for share in (0, 0.31, 1):
        left, top = (int(share * (length - side)) for length in scaled)
        found = scaled_crop(picture, scaled, left, top, side)
        wanted = whole.crop((left, top, left + side, top + side))
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 2


def test_a_strip_of_an_array_takes_the_memory_of_a_square():
    """Whole, it would be 3.9 GB."""
    strip = np.full((1, 100_000, 3), 77, dtype=np.uint8)
    assert (centre_view(strip, 64) == 77).all()
    view = augmented_view(strip, 64, Augmentation(), np.random.default_rng(0), may_flip=True)
    assert view.shape == (64, 64, 3) and (view == 77).all()


def test_soft_masks_are_cut_at_one_half_and_said(caplog):
    soft = np.tile(np.array([0, 40, 127, 128, 200, 255]), (4, 1))
    for dtype in (np.uint8, np.float32, np.uint16, np.int64):
        caplog.clear()
        (found,) = to_masks(soft.astype(dtype))
        assert found[0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
        assert "16 grey pixels of 24" in caplog.text
    assert torch.equal(to_masks(soft / 255)[0], found)
    assert torch.equal(to_masks(torch.from_numpy(soft * 257))[0], found)
    assert torch.equal(to_masks(Image.fromarray(soft.astype(np.uint8)))[0], found)
    caplog.clear()
    assert torch.equal(to_masks(soft > 127)[0], found) and not caplog.text


def test_a_mask_may_be_a_jpeg():
    hard = np.zeros((32, 32), np.uint8)
    hard[8:24, 8:24] = 255
    stored = io.BytesIO()
    Image.fromarray(hard).save(stored, format="JPEG", quality=60)
    assert np.array_equal(to_masks(Image.open(stored))[0][0, 0].numpy(), hard > 127)
