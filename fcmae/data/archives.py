"""ImageNet as downloaded: tars of class tars, folders of class tars, and the flat tar of validation images.

Nothing is unpacked: an image within tars is a piece of the file on disk.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from fcmae.data.images import TarImages
from fcmae.data.index import IMAGE_EXTENSIONS
from fcmae.data.synsets import SYNSET, class_order, find_label_file, validation_labels
from fcmae.errors import DataError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


class _Piece:
    """A part of a file as a file to read, for tarfile."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        self.stream, self.start, self.size, self.position = stream, start, size, 0

    def read(self, count: int = -1) -> bytes:
        left = self.size - self.position
        self.stream.seek(self.start + self.position)
        data = self.stream.read(left if count < 0 else min(count, left))
        self.position += len(data)
        return data

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self.position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position


def members(path: Path, start: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file and size of the files in a tar, which may itself be a piece of the file.

    Raises:
        DataError: if it is not a tar, is compressed, or ends too early.
    """
    try:
        with open(path, "rb") as stream:
            whole = os.stat(path).st_size
            piece = cast(BinaryIO, _Piece(stream, start, whole - start if size is None else size))
            with tarfile.open(fileobj=piece, mode="r:") as archive:
                for member in archive:
                    if start + member.offset_data + member.size > whole:
                        raise tarfile.ReadError(f"it ends inside {member.name}")
                    if member.isfile():
                        yield member.name, start + member.offset_data, member.size
    except tarfile.TarError as error:
        raise DataError(
            f"{path}: cannot be read as a tar ({error}); archives must be complete and uncompressed"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not os.path.basename(name).startswith(".")


def class_tars(source: Path) -> list[tuple[str, Path, int, int]]:
    """Class, file, offset and size of the class tars in a folder or in a tar of tars."""
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
        return [(path.stem, path, 0, os.stat(path).st_size) for path in paths]
    return [(Path(name).stem, source, offset, size) for name, offset, size in members(source) if name.endswith(".tar")]


def holds_class_tars(source: Path) -> bool:
    """Whether a folder holds tars named after synsets, as ImageNet-21k is downloaded, and nothing but them in tars."""
    tars = [path for path in source.iterdir() if path.suffix == ".tar"]
    return bool(tars) and all(SYNSET.fullmatch(path.stem) for path in tars)


def read_class_tars(source: Path, synsets: str | None) -> tuple[list[str], str | None, TarImages, list[str]]:
    """Classes in the order of their labels, the list of synsets that they are, the images, and what was left out."""
    tars = class_tars(source)
    if not tars:
        raise DataError(f"{source}: holds no class tars")
    classes, listed = class_order(sorted({title for title, *_ in tars}), synsets)
    numbers = {title: number for number, title in enumerate(classes)}
    paths: dict[Path, int] = {}
    places: list[np.ndarray] = []
    left_out = []
    for title, path, start, size in tars:
        found = [(offset, length) for name, offset, length in members(path, start, size) if is_image(name)]
        if title not in numbers:
            left_out.append(f"{title}: is not in {synsets}; its {len(found):,} images were left out")
            continue
        file = paths.setdefault(path, len(paths))
        rows = np.array(found, dtype=np.int64).reshape(-1, 2)
        ones = np.ones(len(rows), dtype=np.int64)
        places.append(np.stack([ones * file, rows[:, 0], rows[:, 1], ones * numbers[title]]))
    joined = np.concatenate(places, axis=1) if places else np.empty((4, 0), np.int64)
    if joined.shape[1] == 0:
        raise DataError(f"{source}: holds no images")
    return classes, listed, TarImages(list(paths), *joined), left_out


def read_validation_tar(path: Path, labels: Path | None, classes: list[str]) -> TarImages:
    """The images of the validation tar with their labels. Raises DataError."""
    labels = labels or find_label_file(path.parent)
    if labels is None:
        raise DataError(
            f"{path}: no file with its labels beside it; name one with --val-labels: the development kit "
            "(ILSVRC2012_devkit_t12.tar.gz), LOC_val_solution.csv, or lines of a file name and a label"
        )
    found = [row for row in members(path) if is_image(row[0])]
    if not found:
        raise DataError(f"{path}: holds no images")
    numbers = validation_labels(labels, [os.path.basename(name) for name, _, _ in found], classes)
    offset, size = (np.array([row[part] for row in found], dtype=np.int64) for part in (1, 2))
    return TarImages([path], np.zeros(len(found), np.int32), offset, size, np.array(numbers))
