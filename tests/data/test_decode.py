"""Every mode and format of ordinary photographs becomes 8-bit grey or RGB with the right pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fcmae.data.decode import decode_image, sixteen_to_eight_bits

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
    pixels = np.asarray(decode_image(data, 3))
    assert pixels.shape == (24, 20, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected.astype(int)).mean() <= tolerance
    grey = np.asarray(decode_image(data, 1))
    assert grey.shape == (24, 20)
    assert (
        np.abs(
            grey.astype(int) - np.asarray(Image.fromarray(expected.astype(np.uint8)).convert("L")).astype(int)
        ).mean()
        <= tolerance + 1
    )


def test_broken_bytes_raise():
    data = encode(Image.fromarray(RGB), "JPEG")
    for broken in (data[: len(data) // 2], b"", b"not an image", data[:3]):
        with pytest.raises(Exception, match=r".+"):
            decode_image(broken, 3)


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="floating-point pixels"):
        decode_image(encode(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), 3)


def test_sixteen_to_eight_bits():
    assert sixteen_to_eight_bits(np.array([0, 255, 256, 65535, 70000, -5])).tolist() == [0, 0, 1, 255, 255, 0]
