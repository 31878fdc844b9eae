"""Made-up ImageNet downloads of the real structure: a tar of class tars, one tar per synset, labels in every form."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(rng: np.random.Generator, colour: tuple[int, int, int], width: int = 40, height: int = 32) -> bytes:
    """A noisy picture of one colour."""
    pixels = np.clip(rng.normal(0, 20, (height, width, 3)) + colour, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def colour(number: int) -> tuple[int, int, int]:
    return (60 * (number % 4) + 30, 60 * (number // 4 % 4) + 30, 60 * (number // 16 % 4) + 30)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def class_tar(synset: str, images: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for number, data in enumerate(images):
            add(archive, f"{synset}_{number}.JPEG", data)
    return buffer.getvalue()


def class_images(synsets: list[str], count: int, seed: int = 0) -> dict[str, list[bytes]]:
    rng = np.random.default_rng(seed)
    return {synset: [jpeg(rng, colour(number)) for _ in range(count)] for number, synset in enumerate(sorted(synsets))}


def write_train_tar(path: Path, images: dict[str, list[bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for synset, files in images.items():
            add(archive, f"{synset}.tar", class_tar(synset, files))


def write_val_tar(path: Path, images: list[bytes]) -> list[str]:
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(len(images))]
    with tarfile.open(path, "w") as archive:
        for name, data in zip(names, images, strict=True):
            add(archive, name, data)
    return names


def write_devkit(path: Path, synsets_by_id: list[str], truth: list[int]) -> bytes:
    """The development kit: numbers from 1 in the order of `synsets_by_id`, and one inner node. Returns meta.mat."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number + 1, wnid, "a word", "a gloss", 0) for number, wnid in enumerate(synsets_by_id)]
    rows.append((len(rows) + 1, "n99999999", "an inner node", "", 3))
    synsets = np.array(rows, dtype=fields).reshape(-1, 1)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", buffer.getvalue())
        lines = "".join(f"{number}\n" for number in truth).encode()
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines)
    return buffer.getvalue()
