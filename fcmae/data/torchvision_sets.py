"""Any classification data set of torchvision, by name, as images to pack."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import numpy as np

from fcmae.data.images import FileImages, Images, PixelImages
from fcmae.errors import DataError

PREFIX = "torchvision:"


def read_torchvision(name: str, root: Path, download: bool) -> dict[str, tuple[list[str], Images]]:
    """Class names and images of the splits of `torchvision.datasets.<name>`: train, and val if there is one, else test.

    Data sets that list their files are packed from these, others from the pixels they hand out.

    Raises:
        DataError: for a name that torchvision does not know, data that is not there, and data sets whose targets are
            not one number per image.
    """
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)) or name == "VisionDataset":
        raise DataError(f"{PREFIX}{name}: torchvision.datasets has no {name}")
    parameters = inspect.signature(kind).parameters
    if "train" in parameters:
        choices: dict[str, dict[str, Any]] = {"train": {"train": True}, "val": {"train": False}}
    elif "split" in parameters or "image_set" in parameters:
        key = "split" if "split" in parameters else "image_set"
        choices = {"train": {key: "train"}, "val": {key: "val"}, "test": {key: "test"}}
    else:
        choices = {"": {}}
    options = {"download": True} if download and "download" in parameters else {}
    splits: dict[str, tuple[list[str], Images]] = {}
    for split, choice in choices.items():
        if split == "test" and "val" in splits:
            continue
        try:
            dataset = cast(Any, kind)(str(root), **choice, **options)
        except ValueError as error:  # no split of this name
            if split in ("val", "test"):
                continue
            raise DataError(f"{PREFIX}{name}: {error}") from error
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            raise DataError(f"{PREFIX}{name}: {str(error).splitlines()[0]} (--root {root}, --download)") from error
        splits["val" if split == "test" else split] = _images(dataset, f"{name} {split}".strip())
    return splits


def _images(dataset: Any, name: str) -> tuple[list[str], Images]:
    if len(dataset) == 0:
        raise DataError(f"{PREFIX}{name}: holds no images")
    samples = getattr(dataset, "samples", None)
    if samples is not None:
        root = Path(dataset.root)
        images: Images = FileImages(root, [Path(path) for path, _ in samples], [int(label) for _, label in samples])
    else:
        images = PixelImages(dataset, _labels(dataset, name), name)
    classes = getattr(dataset, "classes", None)
    if not isinstance(classes, list | tuple) or len(classes) <= images.labels.max():
        classes = range(int(images.labels.max()) + 1)
    # Names of several words come as tuples.
    return [", ".join(title) if isinstance(title, tuple) else str(title) for title in classes], images


def _labels(dataset: Any, name: str) -> np.ndarray:
    for attribute in ("targets", "labels", "_labels"):
        labels = np.asarray(getattr(dataset, attribute, []))
        if labels.shape == (len(dataset),) and labels.dtype.kind in "iu":
            return labels
    labels = np.array([np.asarray(dataset[number][1]) for number in range(len(dataset))], dtype=object)
    if labels.shape != (len(dataset),) or not all(np.asarray(label).dtype.kind in "iu" for label in labels):
        raise DataError(f"{PREFIX}{name}: its targets are not one class number per image")
    return labels.astype(np.int64)
