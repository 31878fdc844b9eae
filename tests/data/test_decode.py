"""Every mode and format of ordinary photographs becomes 8-bit grey or RGB with the right pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fcmae.data.decode import JpegPicture, decode_image, open_picture, sixteen_to_eight_bits

ROWS, COLUMNS = np.meshgrid(np.arange(0, 240, 10), np.arange(0, 200, 10), indexing="ij")
RGB = np.stack([ROWS, COLUMNS, np.full((24, 20), 90)], -1).astype(np.uint8)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def cases():
    image = Image.fromarray(RGB)
    yield "jpeg", encode(image, "JPEG", quality=98, subsampling=0), RGB, 3
    yield "progressive jpeg", encode(image, "JPEG", quality=98, subsampling=0, progressive=True), RGB, 3
    yield "png", encode(image, "PNG"), RGB, 0
    yield "lossless webp", encode(image, "WEBP", lossless=True), RGB, 0
    yield "bmp", encode(image, "BMP"), RGB, 0
    yield "tiff", encode(image, "TIFF"), RGB, 0
    rgba = np.dstack([RGB, np.full((24, 20), 7, np.uint8)])
    yield "rgba png", encode(Image.fromarray(rgba), "PNG"), RGB, 0
    yield "rgba webp", encode(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), RGB, 0
    palette = image.quantize(16)
    yield "palette png", encode(palette, "PNG"), np.asarray(palette.convert("RGB")), 0
    transparent = encode(palette, "PNG", transparency=bytes(range(16)))
    yield "palette png with transparency", transparent, np.asarray(palette.convert("RGB")), 0
    yield "gif", encode(palette, "GIF"), np.asarray(palette.convert("RGB")), 0
    cmyk = image.convert("CMYK")
    yield "cmyk jpeg", encode(cmyk, "JPEG", quality=98, subsampling=0), np.asarray(cmyk.convert("RGB")), 4
    grey = RGB[..., 0]
    yield "grey jpeg", encode(Image.fromarray(grey), "JPEG", quality=98), np.repeat(grey[..., None], 3, 2), 2
    yield "grey png", encode(Image.fromarray(grey), "PNG"), np.repeat(grey[..., None], 3, 2), 0
    sixteen = grey.astype(np.uint16) * 257
    yield "16-bit png", encode(Image.fromarray(sixteen), "PNG"), np.repeat(grey[..., None], 3, 2), 0
    yield "16-bit tiff", encode(Image.fromarray(sixteen), "TIFF"), np.repeat(grey[..., None], 3, 2), 0
    yield "bilevel png", encode(Image.fromarray(grey > 100), "PNG"), np.repeat((grey > 100)[..., None] * 255, 3, 2), 0
    grey_alpha = Image.fromarray(np.dstack([grey, np.full_like(grey, 9)]))
    yield "grey png with alpha", encode(grey_alpha, "PNG"), np.repeat(grey[..., None], 3, 2), 0


@pytest.mark.parametrize(
    ("name", "data", "expected", "tolerance"), list(cases()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_formats_and_modes(name, data, expected, tolerance):
    picture = open_picture(data, 3)
    assert (picture.height, picture.width) == (24, 20)
    assert isinstance(picture, JpegPicture) == (name in ("jpeg", "progressive jpeg", "grey jpeg"))
    pixels = picture.pixels()
    assert pixels.shape == (24, 20, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected.astype(int)).mean() <= tolerance
    grey = open_picture(data, 1).pixels()
    assert grey.shape == (24, 20, 1)
    plain = np.asarray(Image.fromarray(expected.astype(np.uint8)).convert("L")).astype(int)
    assert np.abs(grey[..., 0].astype(int) - plain).mean() <= tolerance + 1


def test_broken_bytes_raise():
    data = encode(Image.fromarray(RGB), "JPEG")
    for broken in (data[: len(data) // 2], b"", b"not an image", data[:3]):
        with pytest.raises(Exception, match=r".+"):
            open_picture(broken, 3).pixels()


def test_a_jpeg_with_bytes_too_many_is_read_as_pillow_reads_it():
    data = encode(Image.fromarray(RGB), "JPEG")
    data += b"trailing"
    with_gap = data[:20] + b"\0\0\0" + data[20:]  # between two segments of the header
    for odd in (data, with_gap):
        expected = np.asarray(Image.open(io.BytesIO(odd)))
        assert np.abs(open_picture(odd, 3).pixels().astype(int) - expected).mean() < 1


@pytest.mark.parametrize("size", [(512, 400), (511, 397)])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_at_a_fraction(size, reduction):
    image = Image.fromarray(RGB).resize(size, Image.Resampling.BICUBIC)
    pixels = open_picture(encode(image, "JPEG", quality=95), 3).pixels(reduction)
    assert pixels.shape == (-(-size[1] // reduction), -(-size[0] // reduction), 3)
    reduced = np.asarray(image.resize(pixels.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels.astype(int) - reduced).mean() < 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, ">u2", ">f4"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_arrays(dtype, channels):
    array = (np.arange(6 * 4 * channels).reshape(6, 4, channels) * 3).astype(dtype)
    buffer = io.BytesIO()
    np.save(buffer, array.squeeze(2) if channels == 1 else array)
    picture = open_picture(buffer.getvalue(), channels)
    assert (picture.height, picture.width, picture.channels) == (6, 4, channels)
    assert np.array_equal(picture.pixels(), array)
    assert picture.pixels().dtype.isnative
    with pytest.raises(ValueError, match=rf"height × width × {channels + 1} of uint8, uint16 or float32"):
        open_picture(buffer.getvalue(), channels + 1)


def test_arrays_are_never_unpickled_and_other_types_refused():
    for array, message in ((np.array([{"a": 1}]), "allow_pickle=False"), (np.zeros((2, 2, 3)), "array float64")):
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        with pytest.raises(ValueError, match=message):
            open_picture(buffer.getvalue(), 3)


def test_image_files_have_one_or_three_channels():
    with pytest.raises(ValueError, match=r"hold 1 \(grey\) or 3 \(RGB\) channels, not 4"):
        open_picture(encode(Image.fromarray(RGB), "PNG"), 4)


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="floating-point pixels"):
        decode_image(encode(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), 3)


def test_sixteen_to_eight_bits():
    assert sixteen_to_eight_bits(np.array([0, 255, 256, 65535, 70000, -5])).tolist() == [0, 0, 1, 255, 255, 0]
