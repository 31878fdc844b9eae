"""Where shards are made from: class folders, flat folders and IDX files (the MNIST family).

A source yields (name, extension, bytes, label or None) in a fixed order and reports what it had to leave out.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fcmae.data.decode import open_picture
from fcmae.data.index import IMAGE_EXTENSIONS
from fcmae.data.writer import Sample
from fcmae.errors import DataError

IDX_SPLITS = {"train": "train", "t10k": "val", "test": "val"}
FOLDER_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "val"}
LabelledFile = tuple[Path, "int | None"]


@dataclass
class Split:
    """One split of a source: `classes` is empty where there are no labels, `broken` fills while samples are drawn."""

    name: str
    classes: list[str]
    total: int
    samples: Iterator[Sample]
    broken: list[str] = field(default_factory=list)


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, sorted by path; hidden files are passed over."""
    found = []
    seen = set()
    for directory, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(directory) in seen:  # a link back up, or a second link to the same folder
            folders.clear()
            continue
        seen.add(os.path.realpath(directory))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
                found.append(Path(directory) / name)
    return found


def why_broken(data: bytes) -> str | None:
    """Why image bytes cannot be decoded, or None if they can."""
    try:
        open_picture(data, None).pixels()
    except UnidentifiedImageError:
        return "is in no image format that Pillow knows"
    except Exception as error:  # Pillow raises a dozen types; whichever it is, the file is named and left out
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def list_folder(folder: Path, labelled: bool) -> tuple[list[str], list[LabelledFile]]:
    """Class names and files with labels; if `labelled`, each folder directly in `folder` is a class, sorted."""
    if labelled:
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files: list[LabelledFile] = [
            (p, number) for number, title in enumerate(classes) for p in image_files(folder / title)
        ]
    else:
        classes, files = [], [(path, None) for path in image_files(folder)]
    if not files:
        raise DataError(f"{folder}: holds no image files ({', '.join(IMAGE_EXTENSIONS)})")
    return classes, files


def file_split(name: str, root: Path, classes: list[str], files: list[LabelledFile], verify: bool) -> Split:
    """A split of image files, stored as they are; unreadable ones and, if `verify`, undecodable ones are left out."""
    split = Split(name, classes, len(files), iter(()))

    def draw() -> Iterator[Sample]:
        for number, (path, label) in enumerate(files):
            shown = str(path.relative_to(root))
            shown = shown if shown.isprintable() else repr(shown)
            try:
                data = path.read_bytes()
            except OSError as error:
                split.broken.append(f"{shown}: {error.strerror}")
                continue
            reason = "the file is empty" if not data else why_broken(data) if verify else None
            if reason is not None:
                split.broken.append(f"{shown}: {reason}")
                continue
            # Numbered, so that keys are unique and free of dots whatever the files are called.
            yield f"{number:09d}", path.suffix[1:].lower(), data, label

    split.samples = draw()
    return split


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or not. Raises DataError."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            content = stream.read()
        zero, kind, dimensions = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        if zero != 0 or kind != 8:
            raise ValueError("is not an IDX file of unsigned bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(f"{path}: cannot be read as IDX: {error}") from error


def idx_files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Image and label file of each split of the MNIST family in a folder."""
    found: dict[str, tuple[Path, Path | None]] = {}
    for prefix, split in IDX_SPLITS.items():
        images, labels = (
            sorted(folder.glob(f"{prefix}-{part}-idx{n}-ubyte*")) for part, n in (("images", 3), ("labels", 1))
        )
        if images:
            found[split] = (images[0], labels[0] if labels else None)
    return found


def idx_split(images: Path, labels: Path | None, name: str) -> Split:
    """Images (N, H, W) or (N, H, W, C) and labels of a pair of IDX files; each image becomes a PNG."""
    pixels = read_idx(images)
    numbers = read_idx(labels) if labels is not None else None
    if len(pixels) == 0:
        raise DataError(f"{images}: holds no images")
    if pixels.ndim not in (3, 4):
        raise DataError(f"{images}: holds {pixels.ndim} dimensions; images have 3 or 4")
    if numbers is not None and len(numbers) != len(pixels):
        raise DataError(f"{labels}: holds {len(numbers):,} labels for {len(pixels):,} images in {images.name}")

    def draw() -> Iterator[Sample]:
        for number, image in enumerate(pixels):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            yield f"{number:09d}", "png", buffer.getvalue(), None if numbers is None else int(numbers[number])

    classes = [] if numbers is None else [str(n) for n in range(int(numbers.max()) + 1)]
    return Split(name, classes, len(pixels), draw())


def open_source(
    source: Path, kind: str = "auto", *, verify: bool = True, val_share: float = 0.0, seed: int = 0
) -> list[Split]:
    """The splits of a source; the only split of a source without any is called "".

    `kind` is auto, folders, flat or idx. With auto, a folder holding `*-images-idx3-ubyte[.gz]` files is IDX, one with
    folders in it is class folders and any other a flat folder. Folders named train and val (or validation, test) are
    splits; `val_share` sets that share of a source without splits aside. Files are shuffled by `seed`, so that a shard
    holds all classes.

    Raises:
        DataError: if the source is not there, holds no images, or has splits although `val_share` is given.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder")
    pairs = idx_files(source)
    folders = {entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    split_folders = "train" in folders and folders <= set(FOLDER_SPLITS)
    if val_share and (pairs or split_folders):
        raise DataError(f"{source}: has splits of its own, so --val-share does not apply")
    if kind == "idx" or (kind == "auto" and pairs):
        if not pairs:
            raise DataError(
                f"{source}: holds no train-images-idx3-ubyte or t10k-images-idx3-ubyte file, gzipped or not"
            )
        return [idx_split(images, labels, split) for split, (images, labels) in pairs.items()]
    # Of a validation and a test folder, the first named in FOLDER_SPLITS is val; the test images stay out of it.
    roots = {"": source}
    if split_folders:
        roots = {FOLDER_SPLITS[name]: source / name for name in reversed(FOLDER_SPLITS) if name in folders}
    splits = []
    for name, root in sorted(roots.items()):
        entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        labelled = kind == "folders" or (kind == "auto" and any(entry.is_dir() for entry in entries))
        beside = [e for e in entries if e.is_file() and e.suffix.lower() in IMAGE_EXTENSIONS]
        if kind == "auto" and labelled and beside:
            raise DataError(
                f"{root}: holds {len(beside):,} images beside folders, and the folders may be classes or not; "
                "say --kind flat (no labels, all images) or --kind folders (only images inside the folders)"
            )
        classes, files = list_folder(root, labelled)
        files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
        if val_share:
            held = max(1, round(len(files) * val_share))
            if held >= len(files):
                raise DataError(
                    f"{source}: --val-share {val_share} would leave none of {len(files)} images to train on"
                )
            splits += [
                file_split(n, root, classes, part, verify)
                for n, part in (("train", files[held:]), ("val", files[:held]))
            ]
        else:
            splits.append(file_split(name, root, classes, files, verify))
    if len(splits) == 2 and splits[0].classes != splits[1].classes:
        raise DataError(f"{source}: the class folders of train and val differ")
    return splits
