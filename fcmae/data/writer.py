"""Writing WebDataset shards and their index.

A shard is a tar in which the files of a sample follow one another: `<key>.<extension>`, the image, and `<key>.cls`, its
label as a decimal number.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fcmae.data.index import BLOCK, INDEX_NAME, ShardIndex
from fcmae.errors import DataError
from fcmae.files import written_whole

# key (unique, no dots), extension without the dot, the file's bytes, label or None
Sample = tuple[str, str, bytes, "int | None"]
# Of a plain file without a name, of no bytes, owned by nobody, its sum left out.
HEADER = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
HEADER[148:156] = bytes(8)
RECORD = 20 * BLOCK  # a tar ends at a multiple of this


@dataclass
class Written:
    """What a shard holds, as the index has it: per sample the image's first block, its bytes and label (-1: none)."""

    name: str
    bytes: int = 0
    blocks: array[int] = field(default_factory=lambda: array("I"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    extensions: set[str] = field(default_factory=set)


def write_shard(path: Path, samples: Iterable[Sample]) -> Written:
    """Write one shard, which appears under its name when it is complete; without samples it does not."""
    written = Written(path.name)
    with written_whole(path) as temporary:
        with _Stream(temporary) as stream:
            for key, extension, data, label in samples:
                written.blocks.append(stream.position // BLOCK + 1)
                written.sizes.append(len(data))
                written.labels.append(-1 if label is None else label)
                written.extensions.add(f".{extension.lower()}")
                stream.add(f"{key}.{extension}", data)
                if label is not None:
                    stream.add(f"{key}.cls", str(label).encode())
            stream.put(bytes(2 * BLOCK))
            stream.put(bytes(-stream.position % RECORD))
        written.bytes = stream.position
        if not written.sizes:
            raise DataError(f"{path}: there was no usable image to write")
    return written


class _Stream:
    """A tar that is written in large pieces, without copying what goes into it."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115, closed by __exit__
        self.position = self.waiting = 0
        self.parts: list[bytes | bytearray] = []

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.flush()
        self.file.close()

    def put(self, part: bytes | bytearray) -> None:
        self.parts.append(part)
        self.position += len(part)
        self.waiting += len(part)
        if self.waiting > 1 << 20 or len(self.parts) == 512:  # a call takes 1,024 at most
            self.flush()

    def flush(self) -> None:
        done = os.writev(self.file.fileno(), self.parts)
        rest = memoryview(b"" if done == self.waiting else b"".join(self.parts)[done:])
        while rest:  # the system may take less than all
            rest = rest[self.file.write(rest) :]
        self.parts, self.waiting = [], 0

    def add(self, name: str, data: bytes) -> None:
        """A member of the tar. The same bytes for the same content: no time, no owner."""
        encoded = name.encode()
        if len(encoded) > 100:
            raise ValueError(f"{name}: must be at most 100 bytes long, as in every tar")
        # tarfile takes five times as long to make a header, which would show beside the copying.
        header = bytearray(HEADER)
        header[: len(encoded)] = encoded
        header[124:136] = b"%011o\0" % len(data)
        header[148:156] = b"%06o\0 " % (sum(header) + 8 * ord(" "))  # the sum counts itself as blanks
        self.put(header)
        self.put(data)
        self.put(bytes(-len(data) % BLOCK))


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    prefix: str = "shard",
    samples_per_shard: int = 1000,
    classes: list[str] | None = None,
    provenance: dict | None = None,
) -> ShardIndex:
    """Write samples into `folder`/`prefix`-000000.tar … and the index beside them.

    A shard appears under its name only when it is complete, the index after all shards.

    Raises:
        DataError: if the folder already holds an index, or no sample arrives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX_NAME).exists():
        raise DataError(f"{folder} already holds an index; choose another folder or remove it first")
    shards: list[Written] = []
    buffered: list[Sample] = []

    def flush() -> None:
        shards.append(write_shard(folder / f"{prefix}-{len(shards):06d}.tar", buffered))
        buffered.clear()

    for sample in samples:
        buffered.append(sample)
        if len(buffered) == samples_per_shard:
            flush()
    if buffered:
        flush()
    if not shards:
        raise DataError(f"{folder}: there was no usable image to write")
    index = index_of(folder, shards, classes or [], provenance or {})
    index.save()
    return index


def index_of(folder: Path, shards: list[Written], classes: list[str], provenance: dict) -> ShardIndex:
    """The index of shards that have been written."""

    def joined(part: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(shard, part), dtype=dtype) for shard in shards])

    return ShardIndex(
        folder=folder,
        shards=[shard.name for shard in shards],
        shard_samples=np.array([len(shard.sizes) for shard in shards], dtype=np.int64),
        shard_bytes=np.array([shard.bytes for shard in shards], dtype=np.int64),
        block=joined("blocks", np.uint32),
        size=joined("sizes", np.uint32),
        label=joined("labels", np.int32),
        classes=classes,
        provenance=provenance,
        extensions=sorted(set().union(*(shard.extensions for shard in shards))),
    )
