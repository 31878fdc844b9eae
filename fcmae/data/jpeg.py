"""Crops of JPEGs that decode no more of the file than they need: calls jpeg_cpu.cpp.

H W pixels of an image, C channels. It needs a C++ compiler, and the libjpeg-turbo that comes with the wheels of
torchvision or Pillow or with the system; without either nothing here is available, and images are decoded whole.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fcmae.native import handle, library

# Relative to the packages, in wheels for Linux and for macOS.
BUNDLED = {
    "torchvision": ("../torchvision.libs/libjpeg*", ".dylibs/libjpeg*"),
    "PIL": ("../pillow.libs/libjpeg*", ".dylibs/libjpeg*"),
}
SYSTEM = ("libjpeg.so.62", "libjpeg.so.8", "libjpeg.62.dylib", "libjpeg.8.dylib")
Edges = ctypes.c_int64 * 4
END_OF_IMAGE = b"\xff\xd9"
TRAILING = 64  # bytes that may follow the end of an image


@functools.cache
def available() -> bool:
    """Whether `crop` can do anything; the first call builds the library."""
    return library("jpeg_cpu") is not None and any(map(_bind, _libraries()))


def crop(
    data: bytes, box: tuple[int, int, int, int], reduction: int, size: tuple[int, int], channels: int, flip: bool
) -> Tensor | None:
    """A box (left, upper, right, lower) of a JPEG, resized: (C, height, width) uint8 in channels-last memory.

    Args:
        reduction: 1, 2, 4 or 8; the image is decoded smaller by this factor.
        channels: 1 (grey) or 3 (RGB).
        flip: mirror the result from left to right.

    Returns None for what should be decoded whole: everything where the library is not available, files that are damaged
    where the box is or have no end, and kinds of JPEG that the library does not convert.
    """
    if not available() or data.rfind(END_OF_IMAGE, -TRAILING - len(END_OF_IMAGE)) < 0:
        return None  # without an end: cut short, perhaps below the box
    view = torch.empty(*size, channels, dtype=torch.uint8)
    status = ctypes.c_int64()
    numbers = reduction, channels, *size, flip
    handle("jpeg_cpu", "fcmae_jpeg_crop")(data, len(data), Edges(*box), *numbers, view.data_ptr(), ctypes.byref(status))
    return view.permute(2, 0, 1) if status.value else None


def _libraries() -> list[str]:
    """Where libjpeg may be: in the wheels of torchvision (2-8 % quicker here) or Pillow, or of the system."""
    bundled = []
    for package, patterns in BUNDLED.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent
            bundled += [str(path) for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [*bundled, *SYSTEM]


def _bind(path: str) -> bool:
    status = ctypes.c_int64()
    handle("jpeg_cpu", "fcmae_jpeg_bind")(path.encode(), ctypes.byref(status))
    return bool(status.value)
