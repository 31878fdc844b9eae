"""Where shards are made from: class folders, flat folders, IDX files, ImageNet's tars, torchvision's data sets.

A source is opened as its splits: images that can be read one by one, in an order fixed by a seed.
"""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fcmae.data.archives import TRAIN, VAL, holds_class_tars, read_class_tars, read_validation_tar
from fcmae.data.images import FileImages, Images, PixelImages
from fcmae.data.index import IMAGE_EXTENSIONS, INDEX_NAME
from fcmae.data.synsets import class_order
from fcmae.data.torchvision_sets import PREFIX, read_torchvision
from fcmae.errors import DataError

IDX_SPLITS = {"train": "train", "t10k": "val", "test": "val"}
FOLDER_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "val"}
KINDS = ("auto", "folders", "flat", "idx", "imagenet", "tars")


@dataclass
class Split:
    """One split of a source, called "" if it is the only one.

    classes: names in the order of labels, empty where there are none. order: (N,) the images that are packed, in turn.
    listed: the list of timm's that the classes are. left_out: what was passed over when listing.
    """

    name: str
    classes: list[str]
    images: Images
    order: np.ndarray
    listed: str | None = None
    left_out: list[str] = field(default_factory=list)


@dataclass
class SourceOptions:
    """How a source is read; see `make_shards.py --help`."""

    kind: str = "auto"
    val_share: float = 0.0
    seed: int = 0
    synsets: str | None = None
    val_labels: Path | None = None
    root: Path = Path("data")
    download: bool = False


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


def list_folder(folder: Path, labelled: bool, synsets: str | None) -> tuple[list[str], str | None, FileImages]:
    """Class names, the list of synsets that they are, and images; if `labelled`, each folder in `folder` is a class."""
    if labelled:
        found = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        classes, listed = class_order(found, synsets)
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise DataError(f"{folder}: {unknown[0]} is not in the list {synsets}")
        pairs = [
            (path, number)
            for number, title in enumerate(classes)
            if title in found
            for path in image_files(folder / title)
        ]
    else:
        classes, listed, pairs = [], None, [(path, -1) for path in image_files(folder)]
    if not pairs:
        raise DataError(f"{folder}: holds no image files ({', '.join(IMAGE_EXTENSIONS)})")
    return classes, listed, FileImages(folder, [path for path, _ in pairs], [number for _, number in pairs])


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


def idx_split(images: Path, labels: Path | None) -> tuple[list[str], PixelImages]:
    """Images (N, H, W) or (N, H, W, C) and labels of a pair of IDX files."""
    pixels = read_idx(images)
    numbers = read_idx(labels) if labels is not None else None
    if len(pixels) == 0:
        raise DataError(f"{images}: holds no images")
    if pixels.ndim not in (3, 4):
        raise DataError(f"{images}: holds {pixels.ndim} dimensions; images have 3 or 4")
    if numbers is not None and len(numbers) != len(pixels):
        raise DataError(f"{labels}: holds {len(numbers):,} labels for {len(pixels):,} images in {images.name}")
    classes = [] if numbers is None else [str(n) for n in range(int(numbers.max()) + 1)]
    return classes, PixelImages(pixels, numbers, images.name)


def open_source(source: str, options: SourceOptions) -> list[Split]:
    """The splits of a source.

    With kind auto: `torchvision:<name>` is a data set of torchvision; a folder with ILSVRC2012_img_train.tar, or a tar,
    is ImageNet; a folder of tars named after synsets, ImageNet-21k; one holding `*-images-idx3-ubyte[.gz]` files, IDX;
    one with folders in it, class folders; any other a flat folder. Folders named train and val (or validation, test)
    are splits; `val_share` sets that share of a source without splits aside. Images are shuffled by `seed`, so that a
    shard holds all classes; IDX files keep their order.

    Raises:
        DataError: if the source is not there, holds no images, or has splits although `val_share` is given.
    """
    if source.startswith(PREFIX):
        found = read_torchvision(source.removeprefix(PREFIX), options.root, options.download)
        if len(found) > 1:
            _refuse_share(source, options)
            return [_split(name, classes, images, options.seed) for name, (classes, images) in found.items()]
        ((classes, images),) = found.values()
        return _shared(source, classes, images, options)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: no such folder or file")
    if (path / INDEX_NAME).exists():
        raise DataError(f"{source}: holds shards already, with their index")
    kind = options.kind if options.kind != "auto" else _kind(path)
    if kind == "imagenet":
        return _imagenet(path, options)
    if kind == "tars":
        classes, listed, images, left_out = read_class_tars(path, options.synsets)
        return _shared(source, classes, images, options, listed, left_out)
    if not path.is_dir():
        raise DataError(f"{source}: is no folder, and no tar of ImageNet's")
    if kind == "idx":
        pairs = idx_files(path)
        if not pairs:
            raise DataError(f"{path}: holds no train-images-idx3-ubyte or t10k-images-idx3-ubyte file, gzipped or not")
        _refuse_share(source, options)
        return [_split(name, *idx_split(images, labels), None) for name, (images, labels) in pairs.items()]
    return _folders(path, kind, options)


def _kind(path: Path) -> str:
    if path.is_file() or (path / TRAIN).is_file():
        return "imagenet"
    if holds_class_tars(path):
        return "tars"
    return "idx" if idx_files(path) else "auto"


def _split(
    name: str,
    classes: list[str],
    images: Images,
    seed: int | None,
    listed: str | None = None,
    left_out: list[str] | None = None,
) -> Split:
    order = np.arange(len(images)) if seed is None else np.random.default_rng(seed).permutation(len(images))
    return Split(name, classes, images, order, listed, left_out or [])


def _refuse_share(source: str, options: SourceOptions) -> None:
    if options.val_share:
        raise DataError(f"{source}: has splits of its own, so --val-share does not apply")


def _shared(
    source: str,
    classes: list[str],
    images: Images,
    options: SourceOptions,
    listed: str | None = None,
    left_out: list[str] | None = None,
) -> list[Split]:
    """The images as one split, or as train and val if a share was asked for."""
    whole = _split("", classes, images, options.seed, listed, left_out)
    if not options.val_share:
        return [whole]
    held = max(1, round(len(images) * options.val_share))
    if held >= len(images):
        raise DataError(
            f"{source}: --val-share {options.val_share} would leave none of {len(images)} images to train on"
        )
    return [
        Split("train", classes, images, whole.order[held:], listed, whole.left_out),
        Split("val", classes, images, whole.order[:held], listed),
    ]


def _imagenet(path: Path, options: SourceOptions) -> list[Split]:
    train = path / TRAIN if path.is_dir() else path
    if not train.is_file():
        raise DataError(f"{path}: holds no {TRAIN}")
    classes, listed, images, left_out = read_class_tars(train, options.synsets)
    val = train.with_name(VAL)
    if train.name != TRAIN or not val.is_file():
        return _shared(str(path), classes, images, options, listed, left_out)
    _refuse_share(str(path), options)
    labelled = read_validation_tar(val, options.val_labels, classes)
    return [
        _split("train", classes, images, options.seed, listed, left_out),
        _split("val", classes, labelled, options.seed, listed),
    ]


def _folders(source: Path, kind: str, options: SourceOptions) -> list[Split]:
    folders = {entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    # Of a validation and a test folder, the first named in FOLDER_SPLITS is val; the test images stay out of it.
    roots = {"": source}
    if "train" in folders and folders <= set(FOLDER_SPLITS):
        _refuse_share(str(source), options)
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
        classes, listed, images = list_folder(root, labelled, options.synsets)
        if len(roots) == 1:
            return _shared(str(source), classes, images, options, listed)
        splits.append(_split(name, classes, images, options.seed, listed))
    if splits[0].classes != splits[1].classes:
        raise DataError(f"{source}: the class folders of train and val differ")
    return splits
