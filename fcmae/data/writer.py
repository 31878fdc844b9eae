"""Writing WebDataset shards and their index."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fcmae.data.index import BLOCK, INDEX_NAME, ShardIndex, scan_shard
from fcmae.errors import DataError
from fcmae.files import written_whole

# key (unique, no dots), extension without the dot, the file's bytes, label or None
Sample = tuple[str, str, bytes, "int | None"]


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
    import webdataset  # imports torch; the index alone must stay readable without

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX_NAME).exists():
        raise DataError(f"{folder} already holds an index; choose another folder or remove it first")
    shards: list[str] = []
    buffered: list[Sample] = []

    def flush() -> None:
        name = f"{prefix}-{len(shards):06d}.tar"
        with (
            written_whole(folder / name) as temporary,
            open(temporary, "wb") as stream,
            webdataset.TarWriter(stream, encoder=False, mtime=0.0) as archive,
        ):
            for key, extension, data, label in buffered:
                entry: dict = {"__key__": key, extension: data}
                if label is not None:
                    entry["cls"] = str(label).encode()
                archive.write(entry)
        shards.append(name)
        buffered.clear()

    for sample in samples:
        buffered.append(sample)
        if len(buffered) == samples_per_shard:
            flush()
    if buffered:
        flush()
    if not shards:
        raise DataError(f"{folder}: there was no usable image to write")
    index = index_shards(folder, shards, classes or [], provenance or {})
    index.save()
    return index


def index_shards(folder: Path, shards: list[str], classes: list[str], provenance: dict) -> ShardIndex:
    """The index of existing shards, from their tar headers alone."""
    scans = [scan_shard(folder / name) for name in shards]
    join = [np.concatenate([np.asarray(scan[part], dtype=np.int64) for scan in scans]) for part in range(3)]
    return ShardIndex(
        folder=folder,
        shards=shards,
        shard_samples=np.array([len(scan[0]) for scan in scans], dtype=np.int64),
        shard_bytes=np.array([os.stat(folder / name).st_size for name in shards], dtype=np.int64),
        block=(join[0] // BLOCK).astype(np.uint32),
        size=join[1].astype(np.uint32),
        label=join[2].astype(np.int32),
        classes=classes,
        provenance=provenance,
        extensions=sorted(set().union(*(scan[3] for scan in scans))),
    )
