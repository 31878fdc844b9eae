"""Crops follow torchvision's distribution; views have the asked size; masks are uniform."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from fcmae.data.augment import (
    CentreView,
    TrainView,
    centre_box,
    draw_visible_ids,
    random_resized_crop_box,
    resize,
)
from fcmae.data.decode import Picture, open_picture


def picture(pixels: np.ndarray | Image.Image) -> Picture:
    """Pixels as an array file."""
    pixels = np.asarray(pixels)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return open_picture(buffer.getvalue(), 1 if pixels.ndim == 2 else pixels.shape[2])


def jpeg(image: Image.Image, channels: int = 3, **options) -> Picture:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return open_picture(buffer.getvalue(), channels)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges and some grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(12):
        x, y, side = (int(n) for n in rng.integers(0, min(width, height), 3))
        image.paste(tuple(int(n) for n in rng.integers(0, 256, 3)), (x, y, x + side // 3 + 1, y + side // 4 + 1))
    return Image.fromarray((np.asarray(image) + rng.normal(0, 4, (height, width, 3))).clip(0, 255).astype(np.uint8))


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest gap between two empirical distribution functions."""
    points = np.sort(np.concatenate([a, b]))
    return float(
        np.abs(
            np.searchsorted(np.sort(a), points, "right") / len(a)
            - np.searchsorted(np.sort(b), points, "right") / len(b)
        ).max()
    )


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (300, 40)])
def test_crop_boxes_follow_torchvisions_distribution(width, height):
    count = 4000
    rng = np.random.default_rng(0)
    ours = np.array([random_resized_crop_box(rng, width, height, (0.2, 1.0)) for _ in range(count)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    top, left, h, w = theirs.T
    # 1.95 * sqrt(2 / n) is the two-sample Kolmogorov-Smirnov bound at p = 0.001.
    bound = 1.95 * np.sqrt(2 / count)
    for a, b in ((ours[:, 0], left), (ours[:, 1], top), (ours[:, 2] - ours[:, 0], w), (ours[:, 3] - ours[:, 1], h)):
        assert ks_distance(a, b) < bound
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2] <= width).all()
    assert (ours[:, 3] <= height).all()


def test_extreme_shapes_fall_back_to_the_centre():
    box = random_resized_crop_box(np.random.default_rng(0), 1000, 10, (0.9, 1.0))
    assert box == (493, 0, 506, 10)
    assert random_resized_crop_box(np.random.default_rng(0), 10, 1000, (0.9, 1.0)) == (0, 493, 10, 506)
    assert random_resized_crop_box(np.random.default_rng(0), 1, 1, (0.2, 1.0)) == (0, 0, 1, 1)


def test_views_have_the_asked_size_and_depend_on_the_generator_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    view = TrainView((32, 48))
    first, again, other = (view(picture(image), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (3, 32, 48)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert view(picture(image.convert("L")), np.random.default_rng(1)).shape == (1, 32, 48)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (500, 375), (1600, 1200), (2501, 1999), (4000, 3001)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_train_view_matches_torchvision_pixels(width, height, mode):
    # The larger ones are decoded at a half, quarter or eighth.
    from torchvision.transforms import functional

    buffer = io.BytesIO()
    photo(width, height).convert(mode).save(buffer, "JPEG", quality=92)
    ours = open_picture(buffer.getvalue(), len(mode))
    image = Image.open(io.BytesIO(buffer.getvalue()))
    for seed in range(6):
        left, top, right, bottom = random_resized_crop_box(np.random.default_rng(seed), width, height, (0.2, 1.0))
        view = TrainView((224, 224), hflip=False)(ours, np.random.default_rng(seed)).permute(1, 2, 0).squeeze(2)
        reference = functional.resized_crop(
            image, top, left, bottom - top, right - left, [224, 224], functional.InterpolationMode.BICUBIC
        )
        assert np.abs(view.numpy().astype(int) - np.asarray(reference).astype(int)).mean() <= 1.3


def test_resize_of_any_type_and_number_of_channels():
    rng = np.random.default_rng(0)
    for channels in (1, 2, 3, 4, 7):
        pixels = rng.integers(0, 256, (41, 37, channels), dtype=np.uint8)
        small = np.stack(
            [
                np.asarray(Image.fromarray(pixels[..., c]).resize((16, 12), Image.Resampling.BICUBIC))
                for c in range(channels)
            ]
        )
        got = resize(pixels, (12, 16))
        assert got.shape == (channels, 12, 16)
        assert np.abs(got.numpy().astype(int) - small).max() <= 1
        wide = resize(pixels.astype(np.uint16) * 257, (12, 16))
        assert wide.dtype == torch.uint16
        assert (wide.to(torch.int32) - got.to(torch.int32) * 257).abs().max() < 2.5 * 257
        real = resize(pixels.astype(np.float32) - 1000, (12, 16))
        assert real.dtype == torch.float32
        assert (real + 1000 - got).abs().max() < 30  # not clipped, so edges overshoot


def test_flip_happens_in_half_of_the_samples():
    ramp = picture(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))
    view = TrainView((32, 32), (1.0, 1.0))
    flipped = [view(ramp, np.random.default_rng(seed))[0, 16, 0] > 128 for seed in range(400)]
    assert 150 < sum(flipped) < 250
    never = TrainView((32, 32), (1.0, 1.0), hflip=False)
    assert not any(never(ramp, np.random.default_rng(seed))[0, 16, 0] > 128 for seed in range(50))


def test_centre_box_and_view():
    assert centre_box(100, 50, (32, 32), 1.0) == (25.0, 0.0, 75.0, 50.0)
    assert centre_box(64, 64, (32, 64), 0.5) == (16.0, 24.0, 48.0, 40.0)
    image = Image.fromarray(np.zeros((50, 100), np.uint8))
    image.paste(255, (25, 0, 75, 50))
    for pixels in (np.asarray(image), np.asarray(image).astype(np.float32)):
        view = CentreView((10, 10))(picture(pixels), np.random.default_rng(0))
        assert view.shape == (1, 10, 10)
        assert (view[0, 1:-1, 1:-1] - 255.0).abs().max() < 1e-3


def test_centre_view_is_pillows():
    image = photo(333, 257)
    view = CentreView((64, 96), 0.875)(picture(image), np.random.default_rng(0))
    box = centre_box(333, 257, (64, 96), 0.875)
    assert np.array_equal(
        view.permute(1, 2, 0).numpy(), np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC, box=box))
    )


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 1.0))
@settings(max_examples=300, deadline=None)
def test_centre_box_stays_inside_the_image(width, height, rows, columns, share):
    left, top, right, bottom = centre_box(width, height, (rows * 8, columns * 8), share)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(columns / rows, rel=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (160, 224), (32, 32)])
def test_views_of_awkward_sizes(size):
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = (int(n) for n in rng.integers(1, 700, 2))
        grey = picture(np.zeros((height, width), np.uint8))
        assert CentreView(size)(grey, rng).shape == (1, *size)
        assert TrainView(size)(grey, rng).shape == (1, *size)
        encoded = jpeg(Image.new("RGB", (width * 4, height * 4)))
        assert TrainView(size)(encoded, rng).shape == (3, *size)


def test_visible_ids_are_sorted_and_uniform():
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_visible_ids(rng, 16, 6) for _ in range(2000)])
    assert drawn.dtype == np.int64
    assert (np.diff(drawn, axis=1) > 0).all()
    counts = np.bincount(drawn.ravel(), minlength=16)
    assert np.abs(counts - 750).max() < 110  # five standard deviations
