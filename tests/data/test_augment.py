"""Crops follow torchvision's distribution; views have the asked size; masks are uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from fcmae.data.augment import CentreView, TrainView, centre_box, draw_visible_ids, random_resized_crop_box


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
    first, again, other = (np.asarray(view(image, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert first.shape == (32, 48, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    grey = image.convert("L")
    assert np.asarray(view(grey, np.random.default_rng(1))).shape == (32, 48)


def test_train_view_matches_torchvision_pixels():
    from torchvision.transforms import functional

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((300, 200), Image.Resampling.BICUBIC)
    rng = np.random.default_rng(4)
    left, top, right, bottom = random_resized_crop_box(np.random.default_rng(4), 300, 200, (0.2, 1.0))
    ours = np.asarray(TrainView((64, 64), hflip=False)(image, rng)).astype(int)
    reference = functional.resized_crop(
        image, top, left, bottom - top, right - left, [64, 64], functional.InterpolationMode.BICUBIC
    )
    assert np.abs(ours - np.asarray(reference).astype(int)).mean() < 0.5


def test_flip_happens_in_half_of_the_samples():
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))
    view = TrainView((32, 32), (1.0, 1.0))
    flipped = [np.asarray(view(ramp, np.random.default_rng(seed)))[16, 0] > 128 for seed in range(400)]
    assert 150 < sum(flipped) < 250
    never = TrainView((32, 32), (1.0, 1.0), hflip=False)
    assert not any(np.asarray(never(ramp, np.random.default_rng(seed)))[16, 0] > 128 for seed in range(50))


def test_centre_box_and_view():
    assert centre_box(100, 50, (32, 32), 1.0) == (25.0, 0.0, 75.0, 50.0)
    assert centre_box(64, 64, (32, 64), 0.5) == (16.0, 24.0, 48.0, 40.0)
    image = Image.fromarray(np.zeros((50, 100), np.uint8))
    image.paste(255, (25, 0, 75, 50))
    assert (np.asarray(CentreView((10, 10))(image, np.random.default_rng(0)))[1:-1, 1:-1] == 255).all()


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
        image = Image.new("L", (width, height))
        assert CentreView(size)(image, rng).size == (size[1], size[0])
        assert TrainView(size)(image, rng).size == (size[1], size[0])


def test_visible_ids_are_sorted_and_uniform():
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_visible_ids(rng, 16, 6) for _ in range(2000)])
    assert drawn.dtype == np.int64
    assert (np.diff(drawn, axis=1) > 0).all()
    counts = np.bincount(drawn.ravel(), minlength=16)
    assert np.abs(counts - 750).max() < 110  # five standard deviations
