"""Crops that decode only what they need equal the whole image decoded, cut and resized in float64."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fcmae.data import jpeg
from fcmae.data.augment import crop_resized
from fcmae.data.decode import JpegPicture, open_picture
from fcmae.errors import DataError

KINDS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
}


def encoded(width: int, height: int, channels: int = 3, seed: int = 0, **options) -> bytes:
    """Colours with edges and grain, so that a shift by one pixel or one chroma sample shows."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST)).astype(float)
    image = Image.fromarray((image + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.convert("RGB" if channels == 3 else "L").save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def weights(low: float, high: float, size: int) -> np.ndarray:
    """(size, pixels from floor(low) to ceil(high)) of an antialiased bicubic, a = -0.5, written out."""
    begin, end = int(np.floor(low)), int(np.ceil(high))
    scale = (high - low) / size
    wide = max(scale, 1.0)
    centres = low + (np.arange(size) + 0.5) * scale
    positions = np.arange(begin, end) + 0.5
    x = np.abs(positions[None] - centres[:, None]) / wide
    w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return w / w.sum(1, keepdims=True)


def reference(data: bytes, box, reduction: int, size, channels: int) -> np.ndarray:
    """(height, width, channels) float64 from the whole image as simplejpeg decodes it."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)} if reduction > 1 else {}
    whole = simplejpeg.decode_jpeg(data, {1: "GRAY", 3: "RGB"}[channels], **least).astype(np.float64)
    left, upper, right, lower = (edge / reduction for edge in box)
    right, lower = min(right, whole.shape[1]), min(lower, whole.shape[0])
    cut = whole[int(np.floor(upper)) : int(np.ceil(lower)), int(np.floor(left)) : int(np.ceil(right))]
    rows, columns = weights(upper, lower, size[0]), weights(left, right, size[1])
    return np.einsum("ir,rcx,jc->ijx", rows, cut, columns, optimize=True).clip(0, 255)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_equals_decoding_everything(kind, channels, data):
    reduction, flip = data.draw(st.sampled_from([1, 1, 2, 4, 8])), data.draw(st.booleans())
    least = 1 if reduction == 1 else 8  # of smaller ones simplejpeg finds another scale with as many pixels
    width, height = data.draw(st.integers(least, 150)), data.draw(st.integers(least, 150))
    left, upper = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, lower = data.draw(st.integers(left + 1, width)), data.draw(st.integers(upper + 1, height))
    size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    box = left, upper, right, lower
    file = encoded(width, height, channels, seed=width, **(KINDS[kind] if channels == 3 else {}))
    view = jpeg.crop(file, box, reduction, size, channels, flip)
    assert view.shape == (channels, *size)
    assert view.dtype == torch.uint8
    expected = reference(file, box, reduction, size, channels)
    got = (view.flip(-1) if flip else view).permute(1, 2, 0).numpy()
    assert np.abs(got - expected).max() <= 0.51  # rounding and no more


def test_crops_of_photographs_equal_decoding_everything():
    for seed, size in enumerate([(224, 224), (160, 224), (33, 47), (300, 5)]):
        file = encoded(500, 375, seed=seed)
        for box in [(0, 0, 500, 375), (17, 33, 444, 340), (480, 300, 500, 375), (1, 1, 2, 375)]:
            got = jpeg.crop(file, box, 1, size, 3, False).permute(1, 2, 0).numpy()
            assert np.abs(got - reference(file, box, 1, size, 3)).max() <= 0.51


def test_colour_files_read_as_grey_and_grey_as_colour():
    colour, grey = encoded(60, 50), encoded(60, 50, channels=1)
    box = 3, 4, 55, 49
    as_grey = jpeg.crop(colour, box, 1, (20, 20), 1, False).permute(1, 2, 0).numpy()
    assert np.abs(as_grey - reference(colour, box, 1, (20, 20), 1)).max() <= 0.51
    as_colour = jpeg.crop(grey, box, 1, (20, 20), 3, False).permute(1, 2, 0).numpy()
    assert np.abs(as_colour - reference(grey, box, 1, (20, 20), 3)).max() <= 0.51


def test_files_without_an_end_are_decoded_whole_and_refused():
    file = encoded(200, 200)
    assert jpeg.crop(file + b"\0" * 60, (0, 0, 200, 20), 1, (8, 8), 3, False) is not None
    for damaged in (file[:-200], file[:-200] + b"\0" * 200):
        assert jpeg.crop(damaged, (0, 0, 200, 20), 1, (8, 8), 3, False) is None
        with pytest.raises((OSError, DataError)):
            crop_resized(open_picture(damaged, 3), (0, 0, 200, 20), (8, 8))


def test_damage_where_the_crop_is_gives_none():
    file = bytearray(encoded(200, 200))
    middle = len(file) // 2
    file[middle : middle + 40] = b"\xff\xd8" * 20
    assert jpeg.crop(bytes(file), (0, 0, 200, 200), 1, (8, 8), 3, False) is None
    assert jpeg.crop(b"\xff\xd8\xff\xd9", (0, 0, 1, 1), 1, (8, 8), 3, False) is None


def test_boxes_beyond_the_image_give_none():
    file = encoded(40, 30)
    for box in [(40, 0, 60, 30), (0, 30, 40, 31), (50, 50, 60, 60)]:
        assert jpeg.crop(file, box, 1, (8, 8), 3, False) is None


def test_inks_are_left_to_pillow():
    buffer = io.BytesIO()
    Image.new("CMYK", (40, 30), (10, 200, 30, 4)).save(buffer, "JPEG")
    assert jpeg.crop(buffer.getvalue(), (0, 0, 40, 30), 1, (8, 8), 3, False) is None


@pytest.mark.parametrize("size", [(64, 64), (9, 30)])
def test_without_the_library_the_same_crops(monkeypatch, size):
    file = encoded(700, 500)
    for box in [(0, 0, 700, 500), (13, 57, 200, 321)]:
        quick = crop_resized(open_picture(file, 3), box, size, flip=True)
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "available", lambda: False)
            whole = crop_resized(open_picture(file, 3), box, size, flip=True)
        difference = (quick.int() - whole.int()).abs().float()
        assert difference.mean() < 0.6
        assert difference.max() <= 8
        assert quick.stride() == (1, 3 * size[1], 3)


def test_views_do_not_share_memory():
    picture = JpegPicture(encoded(50, 50), 3)
    first = crop_resized(picture, (0, 0, 50, 50), (16, 16))
    kept = first.clone()
    crop_resized(picture, (20, 20, 50, 50), (16, 16))
    assert torch.equal(first, kept)


def test_libraries_of_both_interfaces_and_none_of_others():
    program = """
from fcmae.data import jpeg
found = jpeg._libraries()
wheels = [path for path in found if "/" in path]
print([jpeg._bind(path) for path in wheels], [jpeg._bind(path) for path in ("/nowhere/libjpeg.so", "libc.so.6")])
import sys
sys.path.insert(0, sys.argv[1])
from test_jpeg import encoded, reference
import numpy as np
file = encoded(90, 70)
for path in wheels:
    assert jpeg.available() and jpeg._bind(path)
    got = jpeg.crop(file, (3, 5, 80, 61), 1, (20, 30), 3, False).permute(1, 2, 0).numpy()
    assert np.abs(got - reference(file, (3, 5, 80, 61), 1, (20, 30), 3)).max() <= 0.51
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[True, True] [False, False]\n"
