"""Every odd file format comes out as the colour that was put in."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isthmus.data.images import UnreadableImage, decode_image

ORANGE = (240, 120, 20)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def colour(data: bytes) -> tuple[int, ...]:
    """The colour in the middle of a plain image."""
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.flags.c_contiguous
    return tuple(int(value) for value in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2])


def near(found: tuple[int, ...], wanted: tuple[int, ...], tolerance: int = 3) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(found, wanted, strict=True))


def test_plain_colour_survives_every_format():
    exact = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    for kind in ("PNG", "BMP", "WEBP", "TIFF", "PPM", "TGA", "JPEG"):
        data = encoded(Image.new("RGB", (16, 16), ORANGE), kind, **exact.get(kind, {}))
        assert near(colour(data), ORANGE), kind


def test_grey_is_repeated_over_the_channels():
    assert colour(encoded(Image.new("L", (8, 8), 77), "PNG")) == (77, 77, 77)
    assert colour(encoded(Image.new("1", (8, 8), 1), "PNG")) == (255, 255, 255)


def test_transparency_is_composited_on_white():
    for alpha, wanted in [(0, (255, 255, 255)), (255, ORANGE), (128, (247, 187, 137))]:
        assert near(colour(encoded(Image.new("RGBA", (8, 8), (*ORANGE, alpha)), "PNG")), wanted, 1)
    # 100 at half opacity on white: 255 - 128/255 * 155 = 177
    assert near(colour(encoded(Image.new("LA", (8, 8), (100, 128)), "PNG")), (177, 177, 177), 1)
    # colours that are transparent without an alpha channel
    assert colour(encoded(Image.new("RGB", (8, 8), ORANGE), "PNG", transparency=ORANGE)) == (255, 255, 255)
    assert colour(encoded(Image.new("L", (8, 8), 9), "PNG", transparency=9)) == (255, 255, 255)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *ORANGE])
    assert colour(encoded(image, "PNG")) == ORANGE
    assert colour(encoded(image, "PNG", transparency=1)) == (255, 255, 255)
    assert near(colour(encoded(image, "PNG", transparency=bytes([255, 128]))), (247, 187, 137), 1)
    assert colour(encoded(image, "GIF")) == ORANGE


def test_cmyk():
    # no ink is white, full magenta and yellow is red
    assert colour(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    assert near(colour(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG", quality=95)), (255, 255, 255))
    assert near(colour(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)), (254, 0, 0))


def test_16_bit_grey_is_scaled_not_clipped():
    for value, wanted in [(0, 0), (65535, 255), (32896, 128), (257 * 77, 77)]:
        grey = np.full((8, 8), value, dtype=np.uint16)
        assert colour(encoded(Image.fromarray(grey), "PNG")) == (wanted,) * 3
        assert colour(encoded(Image.fromarray(grey), "TIFF")) == (wanted,) * 3
        assert colour(encoded(Image.fromarray(grey.astype(np.int32)), "TIFF")) == (wanted,) * 3


def written_png(width: int, height: int, bits: int, pixels: bytes) -> bytes:
    """A colour PNG by hand: `pixels` are rows, each behind its filter byte 0."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_16_bit_colour_png():
    # which Pillow cannot write
    row = b"\0" + np.array([value * 257 for value in ORANGE] * 8, dtype=">u2").tobytes()
    assert colour(written_png(8, 8, 16, zlib.compress(row * 8))) == ORANGE


def test_float_grey_has_white_at_one():
    assert colour(encoded(Image.fromarray(np.full((8, 8), 0.2, dtype=np.float32)), "TIFF")) == (51, 51, 51)
    with pytest.raises(UnreadableImage, match="outside 0..1"):
        decode_image(encoded(Image.fromarray(np.full((8, 8), 3.5, dtype=np.float32)), "TIFF"))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), shade) for shade in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert colour(data) == (255, 0, 0), kind


def test_exif_orientation_is_applied():
    # the corner that a viewer sees at the top left must be white, wherever it is stored
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255
    for orientation, undo in {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.items():
        stored = Image.fromarray(upright)
        if undo is not None:
            stored = stored.transpose(Image.Transpose(undo))
        tags = Image.Exif()
        tags[0x0112] = orientation
        np.testing.assert_array_equal(decode_image(encoded(stored, "PNG", exif=tags)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_pixels():
    data = encoded(Image.new("RGB", (8, 8), ORANGE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert colour(data) == ORANGE


def test_truncated_foreign_and_empty_files_are_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        data = encoded(noise, kind)
        decode_image(data)
        with pytest.raises(UnreadableImage):
            decode_image(data[: len(data) // 2])
    with pytest.raises(UnreadableImage, match="empty"):
        decode_image(b"")
    with pytest.raises(UnreadableImage, match="not an image"):
        decode_image(b"<html>404</html>" * 9)


def test_formats_that_pillow_does_not_read_are_named_with_what_to_do():
    for head, kind in [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
    ]:
        with pytest.raises(UnreadableImage, match=f"{kind}, which Pillow does not read: convert it to PNG or JPEG"):
            decode_image(head + bytes(200))


def test_absurd_sizes_are_refused_from_the_header():
    # above our limit, above Pillow's own, and a strip
    for width, height, said in (
        (9_000, 9_000, "9000 x 9000 pixels are more than the limit"),
        (30_000, 30_000, "limit"),
        (100_000, 1, "100000 x 1"),
    ):
        with pytest.raises(UnreadableImage, match=said):
            decode_image(written_png(width, height, 8, b""))


@given(data=st.data())
def test_damage_anywhere_is_an_image_or_a_refusal(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]))
    whole = bytearray(encoded(Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(whole)).ndim == 3
    except UnreadableImage as error:
        assert str(error)
