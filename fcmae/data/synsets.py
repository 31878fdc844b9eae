"""The order of ImageNet's classes, and the labels of its validation images in the forms they are handed round."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

from fcmae.errors import DataError

SYNSET = re.compile(r"n\d{8}")
LISTS = ("imagenet-1k", "imagenet-12k", "imagenet-22k", "imagenet-21k-goog", "imagenet-21k-miil", "imagenet-22k-ms")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
# Looked for beside the validation images, the clearest first.
LABEL_FILES = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", DEVKIT, "val.txt", GROUND_TRUTH)


def synset_list(name: str) -> list[str]:
    """One of timm's lists of synsets, in the order of the published weights' outputs."""
    from timm.data import ImageNetInfo  # seconds, so only for ImageNet

    return ImageNetInfo(name).label_names()


def class_order(found: list[str], name: str | None) -> tuple[list[str], str | None]:
    """Class names in the order of their labels, and the list of timm's that this is.

    With `name`, that list, whatever was found; else the list whose synsets are exactly those found, or no list and
    sorted names.
    """
    if name is not None:
        return synset_list(name), name
    if len(found) >= 1000 and all(SYNSET.fullmatch(title) for title in found):
        for candidate in LISTS:
            synsets = synset_list(candidate)
            if len(synsets) == len(found) and set(synsets) == set(found):
                return synsets, candidate
    return sorted(found), None


def find_label_file(folder: Path) -> Path | None:
    """The file with the labels of the validation images beside them."""
    return next((folder / name for name in LABEL_FILES if (folder / name).is_file()), None)


def validation_labels(path: Path, names: list[str], classes: list[str]) -> list[int]:
    """The labels of validation images, given by file name.

    `path` is one of: Kaggle's LOC_val_solution.csv; lines of `name label`, the label a synset or a number from 0; one
    synset per line, for the images sorted by name; the development kit; or its ground truth beside its meta.mat.

    Raises:
        DataError: if the file is none of these or does not fit the images or the classes.
    """
    numbers = {title: number for number, title in enumerate(classes)}
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        lines, synsets = _read_devkit(path)
    else:
        try:
            lines, synsets = path.read_text().split("\n"), None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as labels: {error}") from error
    rows = [re.split(r"[,\s]+", line.strip()) for line in lines if line.strip()]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    by_name = bool(rows) and len(rows[0]) > 1
    if len(rows) != len(names) and not by_name:
        raise DataError(f"{path}: holds {len(rows):,} labels for {len(names):,} images")
    if not by_name and all(row[0].isdigit() for row in rows):
        # Numbers of the challenge, from 1, in an order of their own that only meta.mat knows.
        synsets = synsets or _read_meta(path.with_name(META))
        rows = [[synsets.get(int(row[0]), row[0])] for row in rows]
    given = {Path(row[0]).stem: row[1] for row in rows} if by_name else {}
    ordered = sorted(names)
    given = given or {Path(name).stem: row[0] for name, row in zip(ordered, rows, strict=True)}
    counted = all(value.isdigit() for value in given.values())
    if counted and given and not 0 <= min(map(int, given.values())) <= max(map(int, given.values())) < len(classes):
        raise DataError(
            f"{path}: labels that are numbers must be from 0 to {len(classes) - 1}, in the order of the classes"
        )
    labels = []
    for name in names:
        value = given.get(Path(name).stem)
        if value is None:
            raise DataError(f"{path}: holds no label for {name}")
        if not counted and value not in numbers:
            raise DataError(f"{path}: {name} has the label {value}, which is no class of the training images")
        labels.append(int(value) if counted else numbers[value])
    return labels


def _read_devkit(path: Path) -> tuple[list[str], dict[int, str]]:
    """Lines of the ground truth and synset of every number, from the development kit as downloaded."""
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive if member.isfile()}
            truth, meta = (archive.extractfile(members[name]).read() for name in (GROUND_TRUTH, META))  # type: ignore[union-attr]
    except (OSError, tarfile.TarError, KeyError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as the development kit: {error}") from error
    return truth.decode().split("\n"), _parse_meta(meta, path)


def _read_meta(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise DataError(
            f"{path}: needed to read the challenge's numbers as synsets; it comes in {DEVKIT}, "
            "which --val-labels takes as it is"
        )
    return _parse_meta(path.read_bytes(), path)


def _parse_meta(data: bytes, path: Path) -> dict[int, str]:
    """Number of the challenge -> synset, of the leaves among the synsets, from meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path}: reading meta.mat takes scipy, which is not installed: pip install scipy") from None
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: meta.mat is not that of ILSVRC2012: {error}") from error
