"""Bytes to pixels: any format Pillow reads, in any mode, to 8-bit grey or RGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

MODES = {1: "L", 3: "RGB"}


def decode_image(data: bytes, channels: int) -> Image.Image:
    """Decode an image file to mode L (`channels` 1) or RGB (3), 8 bits per channel.

    Transparency is dropped, palettes and CMYK are converted, 16-bit samples keep their upper 8 bits, of an animation
    the first frame is taken; EXIF rotation is not applied. All as torchvision's and timm's folder datasets do, except
    that those clip 16-bit images.

    Raises:
        OSError, SyntaxError, ValueError: whatever Pillow raises for bytes it cannot decode completely.
    """
    with warnings.catch_warnings():
        # Palette images with transparency: Pillow advises RGBA, but the transparency is dropped here anyway.
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        image: Image.Image = Image.open(io.BytesIO(data))
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray(sixteen_to_eight_bits(np.asarray(image)))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def sixteen_to_eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Pillow's 16-bit modes (uint16, or int32 holding 16 bits) to uint8 by dropping the lower byte."""
    return (np.clip(pixels, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
