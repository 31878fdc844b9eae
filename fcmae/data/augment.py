"""Views of an image: the random crop of training and the centred crop of evaluation.

Every draw comes from the sample's own generator, so a view depends on (seed, epoch, sample) and on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fcmae.data.decode import MODES, Box, Picture


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
        share, shape, down, along = rng.random(4).tolist()
        target = area * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(log_low + (log_high - log_low) * shape)
        w = round(math.sqrt(target * aspect))
        h = round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(down * (height - h + 1)), int(along * (width - w + 1))
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


def resize(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W, C) of any type -> (C, height, width) of the same, antialiased bicubic as Pillow's."""
    x = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    if x.dtype == torch.uint8:
        return F.interpolate(x, size, mode="bicubic", antialias=True).squeeze(0)
    y = F.interpolate(x.float(), size, mode="bicubic", antialias=True).squeeze(0)
    return y.round().clamp(0, 65535).to(x.dtype) if x.dtype == torch.uint16 else y


def pillow_resized(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """A box with fractions of (H, W, C) uint8 pixels, C 1 or 3, as (C, height, width): Pillow's bicubic."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image).reshape(*size, -1)).permute(2, 0, 1)


def crop_resized(picture: Picture, box: Box, size: tuple[int, int], flip: bool = False) -> Tensor:
    """A box of a picture, resized and perhaps mirrored: (C, height, width).

    A JPEG is decoded at a half, quarter or eighth where 1.5 times the result's pixels are left along both axes; with
    less, what the decoder's own filter does differently would show (the tests bound it by 1.3/255 in the mean).
    """
    left, upper, right, lower = box
    height, width = lower - upper, right - left
    enough = [k for k in (2, 4, 8) if height >= 1.5 * k * size[0] and width >= 1.5 * k * size[1]]
    reduction = max(enough, default=1)
    view = picture.crop_resized(box, reduction, size, flip)
    if view is not None:
        return view
    pixels = picture.pixels(reduction)
    if pixels.shape[:2] == (picture.height, picture.width):
        view = resize(pixels[upper:lower, left:right], size)
    else:
        rows, columns = pixels.shape[:2]
        x, y = left // reduction, upper // reduction
        cut = pixels[
            y : -(-lower // reduction), x : -(-right // reduction)
        ]  # Pillow's filter would look outside the box
        edges = left / reduction, upper / reduction, min(right / reduction, columns), min(lower / reduction, rows)
        view = pillow_resized(cut, (edges[0] - x, edges[1] - y, edges[2] - x, edges[3] - y), size)
    return view.flip(-1) if flip else view


@dataclass(frozen=True)
class TrainView:
    """RandomResizedCrop (bicubic) and horizontal flip to (height, width) `size`."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    hflip: bool = True

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Tensor:
        box = random_resized_crop_box(rng, picture.width, picture.height, self.scale)
        flip = self.hflip and rng.random() < 0.5
        return crop_resized(picture, box, self.size, flip)


@dataclass(frozen=True)
class CentreView:
    """The centre of the image, resized (bicubic) to (height, width) `size`; nothing random."""

    size: tuple[int, int]
    crop_share: float = 1.0

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Tensor:
        box = centre_box(picture.width, picture.height, self.size, self.crop_share)
        pixels = picture.pixels()
        if pixels.dtype != np.uint8 or picture.channels not in MODES:
            left, upper, right, lower = (round(edge) for edge in box)
            return resize(pixels[upper:lower, left:right], self.size)
        # Pillow's own, whose boxes have fractions: accuracies are compared with those of others.
        return pillow_resized(pixels, box, self.size)


def draw_visible_ids(rng: np.random.Generator, num_patches: int, count: int) -> np.ndarray:
    """The patches of one image that stay visible: (count,) int64, sorted, uniform without replacement."""
    return np.sort(rng.permutation(num_patches)[:count]).astype(np.int64)
