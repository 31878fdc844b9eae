"""The index beside a folder of WebDataset shards: what is in them and where, so that any sample is one read away.

One file, `index.safetensors`: arrays over shards (`shard_samples`, `shard_bytes`) and over all N samples in shard order
(`block` and `size` of the image's bytes in its tar, `label`, -1 where there is none), and a JSON header with the shard
names, class names and what they were made from. Twelve bytes a sample: 15 MB for ImageNet-1k, 170 MB for 21k.
Free of torch.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fcmae.data.storage import Storage, download, is_remote, join, version
from fcmae.errors import DataError
from fcmae.files import written_whole

INDEX_NAME = "index.safetensors"
VERSION = "2"
BLOCK = 512  # bytes; everything in a tar begins at a multiple of it
ARRAYS = {
    "shard_samples": np.int64,
    "shard_bytes": np.int64,
    "block": np.uint32,
    "size": np.uint32,
    "label": np.int32,
}
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".npy")


@dataclass
class ShardIndex:
    """S shards with N samples in all; arrays over samples are in shard order."""

    folder: Path  # of the index file, here or in the cache
    shards: list[str]  # names beside the index, or locations (`fcmae.data.storage`)
    shard_samples: np.ndarray  # (S,) int64
    shard_bytes: np.ndarray  # (S,) int64
    block: np.ndarray  # (N,) uint32, the image's first block of 512 bytes in its tar
    size: np.ndarray  # (N,) uint32, bytes of the image
    label: np.ndarray  # (N,) int32, -1 = none
    classes: list[str] = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    extensions: list[str] = field(default_factory=list)  # of the images, as in their names; not known of old indices
    base: str = ""  # the location that names of shards are relative to, where that is not `folder`
    version: str = ""  # another one when the index was written again

    def __post_init__(self) -> None:
        self._first = [0, *np.cumsum(self.shard_samples).tolist()]

    def __len__(self) -> int:
        return len(self.block)

    def offset(self, sample: int) -> int:
        """Of the first byte of a sample's image in its tar."""
        return int(self.block[sample]) * BLOCK

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def fingerprint(self) -> str:
        """A short digest of where every sample lies: the same for a copy elsewhere, another for other images."""
        digest = hashlib.sha256()
        step = 1 << 20  # a copy in 64 bits of a whole array would take more memory than the index
        for array, unit in (
            (self.shard_samples, 1),
            (self.shard_bytes, 1),
            (self.block, BLOCK),
            (self.size, 1),
            (self.label, 1),
        ):
            for start in range(0, len(array), step):
                digest.update((array[start : start + step].astype(np.int64) * unit).tobytes())
        return digest.hexdigest()[:16]

    def shard_of(self, sample: int) -> int:
        """The shard a sample lies in."""
        return bisect.bisect_right(self._first, sample) - 1

    def first_sample(self, shard: int) -> int:
        return self._first[shard]

    def source(self, shard: int) -> str:
        """Where a shard lies: a path, a URL or a command."""
        name = self.shards[shard]
        return join(self.base, name) if self.base or is_remote(name) else str(self.folder / name)

    @property
    def origin(self) -> str:
        """Where the index came from, for people."""
        return self.base or str(self.folder)

    def check_files(self) -> None:
        """Raise DataError unless every shard that lies on this machine exists in the size the index knows."""
        for shard, expected in enumerate(self.shard_bytes):
            if is_remote(self.source(shard)):
                continue
            try:
                actual = os.stat(self.source(shard)).st_size
            except OSError:
                raise DataError(f"shard {self.shards[shard]} is missing") from None
            if actual != expected:
                raise DataError(
                    f"shard {self.shards[shard]} has {actual:,} bytes where the index expects {expected:,}; "
                    "write the shards and their index again"
                )

    def save(self) -> None:
        """Write the index into its folder, whole or not at all."""
        header = {
            "version": VERSION,
            "shards": json.dumps(self.shards),
            "classes": json.dumps(self.classes),
            "provenance": json.dumps(self.provenance),
            "extensions": json.dumps(self.extensions),
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype=dtype) for name, dtype in ARRAYS.items()}
        with written_whole(self.folder / INDEX_NAME) as temporary:
            save_file(arrays, temporary, metadata=header)


def read_index(path: str | Path, storage: Storage | None = None) -> ShardIndex:
    """The index of a folder of shards, given the folder or the index file itself, here or elsewhere.

    Raises:
        DataError: if there is none, it cannot be read, or names shards that `storage` does not allow.
    """
    storage = storage or Storage()
    base = ""
    if is_remote(str(path)):
        location = str(path) if str(path).endswith(".safetensors") else join(str(path), INDEX_NAME)
        base = str(path).rsplit("/", 1)[0] if location == str(path) else str(path)
        storage.check(location)
        known = version(location) or ""
        file = _brought(location, known, storage)
    else:
        path = Path(path).expanduser()
        file = path if path.suffix == ".safetensors" else path / INDEX_NAME
        try:
            if not path.exists():
                raise DataError("no such file or folder; it must be a folder written by scripts/make_shards.py")
            if not file.is_file():
                raise DataError(f"holds no {INDEX_NAME}; write one with scripts/make_shards.py")
            known = str(file.stat().st_mtime_ns)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error
    try:
        index = _read(file, base)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except DataError as error:
        if not base:
            raise
        file.unlink(missing_ok=True)  # a copy; next time it is fetched anew
        raise DataError(f"{location}: {error}") from error
    index.version = known
    storage.check_names(index.shards, base)
    return index


def _brought(location: str, known: str, storage: Storage) -> Path:
    """A copy of version `known` of an index from elsewhere, the one of before where versions are told apart."""
    where, which = (hashlib.sha256(text.encode()).hexdigest()[:20] for text in (location, known))
    file = storage.cache_dir / f"index-{where}-{which}.safetensors"
    if not known or not file.exists():
        try:
            with written_whole(file) as temporary:
                download(location, temporary)
            for other in storage.cache_dir.glob(f"index-{where}-*.safetensors"):
                if other != file:  # of before; who has it mapped keeps it
                    other.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir={storage.cache_dir}: cannot be used: {error.strerror}") from error
    return file


def _read(file: Path, base: str) -> ShardIndex:
    with open(file, "rb"):  # of which safetensors would say that it is not there
        pass
    try:
        with safe_open(file, framework="numpy") as handle:
            header = handle.metadata() or {}
            version = header.get("version")
            if version not in ("1", VERSION):
                raise DataError(f"{INDEX_NAME} is of version {version}, this program reads up to {VERSION}")
            if version == "1":  # bytes where there are blocks now, everything in 64 bits
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, not a mapping
                arrays["block"] = arrays.pop("offset") // BLOCK
                arrays = {name: arrays[name].astype(dtype) for name, dtype in ARRAYS.items()}
            else:
                arrays = _mapped(file)
        index = ShardIndex(
            folder=file.parent,
            shards=json.loads(header["shards"]),
            classes=json.loads(header["classes"]),
            provenance=json.loads(header["provenance"]),
            extensions=json.loads(header.get("extensions", "[]")),
            base=base,
            **arrays,
        )
        for names in (index.shards, index.classes, index.extensions):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("its names are no list of words")
        shards, samples = len(index.shards), int(index.shard_samples.sum())
        lengths = [len(array) for array in (index.shard_samples, index.shard_bytes)]
        if lengths != [shards] * 2 or [len(a) for a in (index.block, index.size, index.label)] != [samples] * 3:
            raise ValueError("its parts do not fit each other")
    except DataError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{INDEX_NAME} cannot be read ({error}); write it again with scripts/make_shards.py") from None
    return index


def _mapped(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file (which has been checked by opening it) as maps of the file, not copies.

    Processes of a node share its pages, and what is never asked for is never read.
    """
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(length))
    return {
        # As plain arrays: to get one number of a memmap takes twice the time.
        name: np.asarray(
            np.memmap(file, dtype, "r", 8 + length + entries[name]["data_offsets"][0], tuple(entries[name]["shape"]))
        )
        for name, dtype in ARRAYS.items()
    }


def split_size(path: str | None, storage: Storage | None = None) -> int:
    """Number of samples in a split, without reading more than its header; the demo's is known before it is rendered."""
    from fcmae.data.demo import SPLITS

    if path == "demo":
        return SPLITS["train"]
    return len(read_index(str(path), storage))
