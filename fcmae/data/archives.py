"""ImageNet as downloaded: tars of class tars, folders of class tars, and the flat tar of validation images.

Nothing is unpacked: an image within tars is a piece of the file on disk.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from fcmae.data.images import TarImages
from fcmae.data.index import BLOCK, IMAGE_EXTENSIONS
from fcmae.data.synsets import SYNSET, class_order, find_label_file, validation_labels
from fcmae.errors import DataError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


class _Piece:
    """A part of a file as a file to read, for tarfile."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        self.stream, self.start, self.size, self.position = stream, start, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        self.stream.seek(self.start + self.position)
        data = self.stream.read(left if count < 0 else min(count, left))
        self.position += len(data)
        return data

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self.position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position


def members(path: Path, start: int = 0, size: int | None = None, inner: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file and size of the files in a tar, which may itself be a piece of the file, named `inner`.

    Raises:
        DataError: if it is not a tar, is compressed, damaged or cut short, or holds images without their bytes.
    """
    try:
        with open(path, "rb") as stream:
            whole = os.stat(path).st_size - start
            length = whole if size is None else min(whole, size)
            piece = cast(BinaryIO, _Piece(stream, start, length))
            with tarfile.open(fileobj=piece, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > length:
                        raise tarfile.ReadError(f"it ends inside {member.name}")
                    check_bytes(member)
                    if member.isfile():
                        yield member.name, start + member.offset_data, member.size
                check_end(archive, piece)
    except tarfile.TarError as error:
        where = f"{path}: {inner}" if inner else path
        raise DataError(
            f"{where}: cannot be read as a tar ({error}); archives must be complete and uncompressed"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def check_bytes(member: tarfile.TarInfo) -> None:
    """Raise tarfile.ReadError for an image whose bytes do not follow its header."""
    if is_image(member.name) and (member.islnk() or member.issym() or member.issparse()):
        raise tarfile.ReadError(
            f"{member.name} is a link or a sparse file; pack it with tar --dereference --hard-dereference, "
            "without --sparse"
        )


def check_end(archive: tarfile.TarFile, stream: BinaryIO) -> None:
    """Raise tarfile.ReadError if tarfile came to the end of its list where the tar does not end, of which it is silent.

    stream: what the archive was opened from.
    """
    stream.seek(archive.offset)
    found = stream.read(BLOCK)
    if found != bytes(BLOCK):
        raise tarfile.ReadError(f"no end, but {'something else' if found else 'nothing'} at {archive.offset:,}")


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not os.path.basename(name).startswith(".")


def _rows(found: Iterable[tuple[str, int, int]]) -> np.ndarray:
    """Offset, size and kind (a number in IMAGE_EXTENSIONS) of the images among members: (N, 3) int64."""
    images = ((at, size, os.path.splitext(name)[1].lower()) for name, at, size in found if is_image(name))
    rows = [(at, size, IMAGE_EXTENSIONS.index(extension)) for at, size, extension in images]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


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
        rows = _rows(members(path, start, size, "" if source.is_dir() else f"{title}.tar"))
        if title not in numbers:
            left_out.append(f"{title}: is not in {synsets}; its {len(rows):,} images were left out")
            continue
        file = paths.setdefault(path, len(paths))
        ones = np.ones(len(rows), dtype=np.int64)
        places.append(np.stack([ones * file, *rows.T, ones * numbers[title]]))
    joined = np.concatenate(places, axis=1) if places else np.empty((5, 0), np.int64)
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
    offset, size, kind = _rows(found).T
    return TarImages([path], np.zeros(len(found), np.int32), offset, size, kind, np.array(numbers))
