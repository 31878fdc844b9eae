"""Bytes to pixels: JPEG by libjpeg-turbo (simplejpeg, jpeg.py), arrays as they are, every other format by Pillow.

H W pixels of an image, C channels. A picture knows its size from its header; pixels are decoded when a view asks for
them, no larger than the view needs.
"""

from __future__ import annotations

import io
import warnings
from abc import ABC, abstractmethod

import numpy as np
import simplejpeg
from PIL import Image
from torch import Tensor

from fcmae.data import jpeg
from fcmae.errors import in_a_line

Box = tuple[int, int, int, int]  # left, upper, right, lower
MODES = {1: "L", 3: "RGB"}
COLOURSPACES = {1: "GRAY", 3: "RGB"}
ARRAY_TYPES = (np.uint8, np.uint16, np.float32)
UNITS = {"uint8": 255, "uint16": 65535}  # what counts as 1; float32 is taken as it is


class Picture(ABC):
    """An encoded image of `height` x `width` pixels and `channels` channels."""

    height: int
    width: int
    channels: int
    damage: str | None = None  # what libjpeg-turbo found wrong with a JPEG that Pillow decoded nevertheless

    @abstractmethod
    def pixels(self, reduction: int = 1) -> np.ndarray:
        """(H, W, C), uint8 for image formats, the array's own type for arrays.

        Args:
            reduction: 1, 2, 4 or 8; the result may be smaller by that factor, rounded up, where that decodes quicker.

        Raises:
            OSError, SyntaxError, ValueError: for bytes that cannot be decoded completely.
        """

    def crop_resized(self, box: Box, reduction: int, size: tuple[int, int], flip: bool) -> Tensor | None:
        """A box, resized and perhaps mirrored: (C, height, width) uint8, where that is quicker than `pixels`; or None.

        Args as for `pixels`; `reduction` is always followed.
        """
        return None


class JpegPicture(Picture):
    def __init__(self, data: bytes, channels: int) -> None:
        self.height, self.width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
        if colourspace in ("CMYK", "YCCK"):
            raise ValueError("no conversion from inks")
        self.data, self.channels = data, channels

    def pixels(self, reduction: int = 1) -> np.ndarray:
        least = {}
        if reduction > 1:  # the decoder takes the smallest scale that is still as large
            least = {"min_height": -(-self.height // reduction), "min_width": -(-self.width // reduction)}
        try:
            return simplejpeg.decode_jpeg(self.data, COLOURSPACES[self.channels], **least)
        except ValueError as error:  # Pillow, and with it torchvision, passes over damage; or names it better
            pixels = PillowPicture(self.data, self.channels).pixels()
            self.damage = in_a_line(error)
            return pixels

    def crop_resized(self, box: Box, reduction: int, size: tuple[int, int], flip: bool) -> Tensor | None:
        return jpeg.crop(self.data, box, reduction, size, self.channels, flip)


class PillowPicture(Picture):
    def __init__(self, data: bytes, channels: int) -> None:
        with Image.open(io.BytesIO(data)) as image:
            self.width, self.height = image.size
        self.data, self.channels = data, channels

    def pixels(self, reduction: int = 1) -> np.ndarray:
        return np.array(decode_image(self.data, self.channels)).reshape(self.height, self.width, self.channels)


class ArrayPicture(Picture):
    """A `.npy` file of (H, W, C) or, with one channel, (H, W)."""

    def __init__(self, data: bytes, channels: int | None) -> None:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        array = array.astype(array.dtype.newbyteorder("="))
        if array.ndim == 2:
            array = array[..., None]
        if (
            array.ndim != 3
            or array.shape[2] != (channels or array.shape[2])
            or array.dtype not in ARRAY_TYPES
            or 0 in array.shape
        ):
            raise ValueError(
                f"holds an array {array.dtype} {array.shape}; it must be height × width × {channels or 'channels'} "
                "of uint8, uint16 or float32"
            )
        self.array = array
        self.height, self.width, self.channels = array.shape

    def pixels(self, reduction: int = 1) -> np.ndarray:
        return self.array


def open_picture(data: bytes, channels: int | None) -> Picture:
    """The picture in the bytes of a file; None takes arrays of any number of channels. Raises like `Picture.pixels`."""
    if data[:6] == b"\x93NUMPY":
        return ArrayPicture(data, channels)
    channels = channels or 3
    if channels not in MODES:
        raise ValueError(f"image files hold 1 (grey) or 3 (RGB) channels, not {channels}")
    if data[:2] == b"\xff\xd8":
        try:
            return JpegPicture(data, channels)
        except ValueError:  # inks, or a header that libjpeg-turbo does not take
            pass
    return PillowPicture(data, channels)


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
