"""Images as they lie in a source, numbered, each readable by itself: in files, in tars, in arrays, in a data set.

What shards are packed from. A list of images travels to the processes that pack, so it holds places, not pixels.
"""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcmae.data.index import BLOCK, IMAGE_EXTENSIONS


class Images(ABC):
    """N images; `labels` (N,) int32, -1 where there is none."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, number: int) -> tuple[str, bytes]:
        """Extension without a dot, and the bytes of the image as a file.

        Raises OSError with a number where the system refuses, other errors for this image alone.
        """

    @abstractmethod
    def shown(self, number: int) -> str:
        """What a user would call the image, printable."""

    @abstractmethod
    def sizes(self) -> np.ndarray:
        """(N,) int64 bytes of each image, about."""


def printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


class FileImages(Images):
    """Files below `root`."""

    def __init__(self, root: Path, paths: list[Path], labels: list[int | None]) -> None:
        self.root = root
        self.paths = [str(path.relative_to(root)) for path in paths]
        self.labels = np.array([-1 if label is None else label for label in labels], dtype=np.int32)

    def read(self, number: int) -> tuple[str, bytes]:
        path = self.paths[number]
        try:
            with open(f"{self.root}/{path}", "rb", buffering=0) as stream:
                return os.path.splitext(path)[1][1:].lower(), stream.read()
        except FileNotFoundError:
            if os.path.islink(self.root / path):
                raise ValueError("is a link to nothing") from None
            raise

    def shown(self, number: int) -> str:
        return printable(self.paths[number])

    def sizes(self) -> np.ndarray:
        return np.array([_size(self.root / path) for path in self.paths], dtype=np.int64)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # said when it is read
        return 0


class TarImages(Images):
    """Members of tars, also of tars within tars: each a piece of a file on disk.

    Of each its file in `paths`, where in that its bytes begin, how many, and which of IMAGE_EXTENSIONS it has (the
    header before its bytes may have its name cut short).
    """

    def __init__(
        self,
        paths: list[Path],
        archive: np.ndarray,
        offset: np.ndarray,
        size: np.ndarray,
        kind: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        self.paths, self.archive, self.offset, self.size = paths, archive.astype(np.int32), offset, size
        self.kind = kind.astype(np.uint8)
        self.labels = labels.astype(np.int32)
        self._open: dict[int, int] = {}

    def _file(self, number: int) -> int:
        archive = int(self.archive[number])
        if archive not in self._open:
            if len(self._open) >= 128:  # ImageNet-21k comes in 21,841 files
                os.close(self._open.pop(next(iter(self._open))))
            self._open[archive] = os.open(self.paths[archive], os.O_RDONLY)
        return self._open[archive]

    def name(self, number: int) -> str:
        """The member's name, from the header before its bytes."""
        header = os.pread(self._file(number), BLOCK, int(self.offset[number]) - BLOCK)
        return header[:100].rstrip(b"\0").decode("utf-8", "replace")

    def read(self, number: int) -> tuple[str, bytes]:
        size = int(self.size[number])
        data = os.pread(self._file(number), size, int(self.offset[number]))
        if len(data) != size:
            raise OSError(0, "the archive ends inside it")
        return IMAGE_EXTENSIONS[self.kind[number]][1:], data

    def shown(self, number: int) -> str:
        return printable(f"{self.paths[int(self.archive[number])].name}: {self.name(number)}")

    def sizes(self) -> np.ndarray:
        return self.size.astype(np.int64)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


class PixelImages(Images):
    """Arrays (H, W) or (H, W, 3) of uint8, or Pillow images, that a data set hands out; packed as PNG, without loss."""

    def __init__(self, items: Any, labels: np.ndarray | None, name: str) -> None:
        self.items, self.name = items, name
        self.labels = np.full(len(items), -1, np.int32) if labels is None else labels.astype(np.int32)

    def read(self, number: int) -> tuple[str, bytes]:
        item = self.items[number]
        item = item[0] if isinstance(item, tuple) else item
        buffer = io.BytesIO()
        image = item if isinstance(item, Image.Image) else Image.fromarray(np.asarray(item))
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()

    def shown(self, number: int) -> str:
        return f"{self.name}: image {number}"

    def sizes(self) -> np.ndarray:
        one = len(self.read(0)[1]) if len(self) else 0
        return np.full(len(self), one, dtype=np.int64)
