"""Views of an image: the random crop of training and the centred crop of evaluation.

Every draw comes from the sample's own generator, so a view depends on (seed, epoch, sample) and on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, upper, right, lower


def random_resized_crop_box(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """The box of torchvision's RandomResizedCrop: same distribution, drawn from `rng`.

    Ten tries at an area share uniform in `scale` and an aspect ratio log-uniform in `ratio`; then the largest centred
    box within `ratio`.
    """
    area = width * height
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(log_low, log_high))
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(width: int, height: int, size: tuple[int, int], crop_share: float) -> tuple[float, float, float, float]:
    """The centred box of aspect `size` (height, width) that covers `crop_share` of the image's tighter side."""
    scale = crop_share * min(width / size[1], height / size[0])
    w, h = size[1] * scale, size[0] * scale
    left, top = max(0.0, (width - w) / 2), max(0.0, (height - h) / 2)  # rounding may fall a hair outside
    return left, top, min(left + w, width), min(top + h, height)


@dataclass(frozen=True)
class TrainView:
    """RandomResizedCrop (bicubic) and horizontal flip to (height, width) `size`."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    hflip: bool = True

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        box = random_resized_crop_box(rng, image.width, image.height, self.scale)
        flip = self.hflip and rng.random() < 0.5
        image = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


@dataclass(frozen=True)
class CentreView:
    """The centre of the image, resized (bicubic) to (height, width) `size`; nothing random."""

    size: tuple[int, int]
    crop_share: float = 1.0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        box = centre_box(image.width, image.height, self.size, self.crop_share)
        return image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box)


def draw_visible_ids(rng: np.random.Generator, num_patches: int, count: int) -> np.ndarray:
    """The patches of one image that stay visible: (count,) int64, sorted, uniform without replacement."""
    return np.sort(rng.permutation(num_patches)[:count]).astype(np.int64)
