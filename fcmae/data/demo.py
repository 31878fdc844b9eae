"""Rendered images for trying things out anywhere, offline: shapes and regular textures in random colours.

Six shapes on smooth backgrounds and six textures, at random scale, position and rotation. Colours are drawn alike for
every class, so a classifier must look at form; outlines, gradients and periods continue from patch to patch, so hidden
patches can partly be inferred from visible ones. Rendered once into the user's cache as ordinary shards.
"""

from __future__ import annotations

import colorsys
import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fcmae.files import cache_folder

SIDE = 64
SPLITS = {"train": 4800, "val": 960}
SHAPES = ("disc", "ring", "square", "triangle", "star", "cross")
TEXTURES = ("stripes", "checks", "dots", "waves", "circles", "grid")
CLASSES = SHAPES + TEXTURES
VERSION = 1


def demo_folder() -> Path:
    return cache_folder() / f"demo-{VERSION}"


def ensure_demo() -> Path:
    """The folder of the demo's `train` and `val` shards, rendered if need be; safe to call from several processes."""
    from fcmae.data.index import INDEX_NAME
    from fcmae.data.writer import write_shards

    folder = demo_folder()
    if all((folder / split / INDEX_NAME).is_file() for split in SPLITS):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for number, (split, count) in enumerate(SPLITS.items()):
            samples = ((f"{i:06d}", "png", encode_png(render(number, i)), i % len(CLASSES)) for i in range(count))
            write_shards(samples, temporary / split, prefix=split, classes=list(CLASSES), provenance={"source": "demo"})
        temporary.chmod(0o755)
        if not all((folder / split / INDEX_NAME).is_file() for split in SPLITS):
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
            with contextlib.suppress(OSError):  # another process was first
                os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def render(split: int, number: int) -> np.ndarray:
    """Image `number` of a split (0 train, 1 val) as (64, 64, 3) uint8; its class is number modulo the classes."""
    rng = np.random.default_rng((VERSION, split, number))
    name = CLASSES[number % len(CLASSES)]
    first, second = _colours(rng)
    if name in SHAPES:
        u, v = _coordinates(rng, scale=rng.uniform(0.35, 0.8), shift=0.35)
        cover = _smooth_step(_shape(name, u, v), softness=0.04)
        background = _gradient(rng, first)
        foreground = _gradient(rng, second)
    else:
        u, v = _coordinates(rng, scale=rng.uniform(0.12, 0.28), shift=1.0)
        cover = _smooth_step(_texture(name, u, v), softness=0.12)
        background = _gradient(rng, first)
        foreground = _gradient(rng, second)
    image = background + (foreground - background) * cover[..., None]
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours far enough apart to be told from each other."""
    while True:
        pair = [
            np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.25, 1.0))) for _ in "ab"
        ]
        if np.abs(pair[0] - pair[1]).sum() > 0.8:
            return pair[0], pair[1]


def _coordinates(rng: np.random.Generator, scale: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel positions in the rotated, shifted and scaled frame of the figure; the image spans [-1, 1] at scale 1."""
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    x, y = x - rng.uniform(-shift, shift), y - rng.uniform(-shift, shift)
    angle = rng.uniform(0, 2 * np.pi)
    return (np.cos(angle) * x + np.sin(angle) * y) / scale, (np.cos(angle) * y - np.sin(angle) * x) / scale


def _gradient(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A linear run of brightness across the image in one colour: (64, 64, 3)."""
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    run = np.cos(angle) * x + np.sin(angle) * y
    return colour * (1 + rng.uniform(0.15, 0.4) * run)[..., None]


def _smooth_step(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 inside (distance below 0), 0 outside, with a soft edge instead of stairs."""
    return np.clip(0.5 - distance / (2 * softness), 0, 1)


def _shape(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline of a figure of about unit radius, negative inside."""
    radius = np.hypot(u, v)
    if name == "disc":
        return radius - 0.9
    if name == "ring":
        return np.abs(radius - 0.75) - 0.22
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.8
    if name == "triangle":
        return np.maximum(np.maximum(-v, 0.866 * u + 0.5 * v), -0.866 * u + 0.5 * v) - 0.55
    if name == "star":
        fold = np.abs(np.mod(np.arctan2(v, u), 2 * np.pi / 5) - np.pi / 5) / (np.pi / 5)
        return radius - (0.42 + 0.68 * fold)
    bar = np.maximum(np.abs(u) - 0.28, np.abs(v) - 0.95)  # cross
    return np.minimum(bar, np.maximum(np.abs(v) - 0.28, np.abs(u) - 0.95))


def _texture(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A periodic field of period about 2, negative where the second colour is."""
    if name == "stripes":
        return np.sin(np.pi * u)
    if name == "checks":
        return np.sin(np.pi * u) * np.sin(np.pi * v)
    if name == "dots":
        return np.hypot(np.mod(u, 2) - 1, np.mod(v, 2) - 1) - 0.65
    if name == "waves":
        return np.sin(np.pi * (u + 0.6 * np.sin(np.pi * v * 0.5)))
    if name == "circles":
        return np.sin(np.pi * np.hypot(u, v))
    return np.minimum(np.abs(np.mod(u, 2) - 1), np.abs(np.mod(v, 2) - 1)) - 0.22  # grid
