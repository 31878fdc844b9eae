"""The index: its size on disk and in memory, its versions, its fingerprint."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_split
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fcmae.data.index import ARRAYS, BLOCK, INDEX_NAME, ShardIndex, read_index
from fcmae.errors import DataError


def made_up(folder, samples: int, shards: int) -> ShardIndex:
    """An index without its shards."""
    rng = np.random.default_rng(0)
    counts = np.full(shards, samples // shards)
    counts[: samples - counts.sum()] += 1
    size = rng.integers(50_000, 170_000, samples).astype(np.uint32)
    blocks = -(-size.astype(np.int64) // BLOCK) + 3
    first = np.cumsum(blocks) - blocks
    ends = np.cumsum(counts)
    start = np.repeat(first[ends - counts], counts)
    return ShardIndex(
        folder=folder,
        shards=[f"shard-{number:06d}.tar" for number in range(shards)],
        shard_samples=counts,
        shard_bytes=np.add.reduceat(blocks, ends - counts) * BLOCK + 2 * BLOCK,
        block=(first - start + 1).astype(np.uint32),
        size=size,
        label=rng.integers(0, 1000, samples).astype(np.int32),
        classes=[f"class {number}" for number in range(1000)],
    )


def test_what_is_saved_is_read(tmp_path):
    index = made_up(tmp_path, 1000, 7)
    index.save()
    again = read_index(tmp_path)
    for name in ARRAYS:
        assert np.array_equal(getattr(again, name), getattr(index, name))
    assert (again.shards, again.classes, len(again)) == (index.shards, index.classes, 1000)
    assert again.fingerprint == index.fingerprint
    assert (tmp_path / INDEX_NAME).stat().st_size < 12 * 1000 + 20_000


def test_the_first_version_is_read_too(tmp_path):
    index = read_index(make_split(tmp_path, 40))
    path, arrays = tmp_path / INDEX_NAME, load_file(tmp_path / INDEX_NAME)
    arrays["offset"] = arrays.pop("block").astype(np.int64) * BLOCK
    header = {"version": "1", "shards": json.dumps(index.shards), "classes": json.dumps(index.classes)}
    save_file({name: array.astype(np.int64) for name, array in arrays.items()}, path, header | {"provenance": "{}"})
    again = read_index(tmp_path)
    assert again.fingerprint == index.fingerprint
    assert [again.offset(i) for i in range(40)] == [index.offset(i) for i in range(40)]
    assert again.label.dtype == np.int32


@pytest.mark.parametrize("wrong", ["version", "array"])
def test_other_files_are_refused(tmp_path, wrong):
    arrays = {name: np.ones(3, dtype=dtype) for name, dtype in ARRAYS.items()}
    header = {"version": "2", "shards": "[]", "classes": "[]", "provenance": "{}"}
    if wrong == "version":
        header["version"] = "9"
    else:
        del arrays["label"]
    save_file(arrays, tmp_path / INDEX_NAME, header)
    with pytest.raises(DataError, match="is of version 9" if wrong == "version" else "cannot be read .*label"):
        read_index(tmp_path)


MEASURE = """
import resource, sys, time
from fcmae.data.index import read_index
from fcmae.data.order import BatchPlan
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = peak(), time.perf_counter()
index = read_index(sys.argv[1])
index.fingerprint, index.label.max()
loaded, in_index = time.perf_counter() - start, peak() - before
start = time.perf_counter()
plan = BatchPlan(index.shard_samples, 4096, rank=3, ranks=8)
for step in range(plan.steps_per_epoch):
    plan.samples(step)
print(loaded, in_index, time.perf_counter() - start, peak() - before - in_index)
"""


@pytest.mark.parametrize(
    ("samples", "shards", "seconds", "megabytes"),
    [(1_281_167, 1_282, 1, 64), pytest.param(14_200_000, 14_200, 5, 300, marks=pytest.mark.slow)],
    ids=["ImageNet-1k", "ImageNet-21k"],
)
def test_large_indices_are_quick_and_small(tmp_path, samples, shards, seconds, megabytes):
    made_up(tmp_path, samples, shards).save()
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    loaded, index_megabytes, ordered, order_megabytes = map(float, done.stdout.split())
    assert loaded < seconds
    assert index_megabytes < megabytes
    # The order of a whole epoch for one rank of eight.
    assert ordered < seconds
    assert order_megabytes < 64


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        ({"shards": None}, {}),
        ({"shards": "[1"}, {}),
        ({"classes": "7"}, {}),
        ({}, {"label": 3}),
        ({}, {"shard_bytes": 1}),
    ],
)
def test_indices_whose_parts_do_not_fit_are_refused(tmp_path, header, arrays):
    made_up(tmp_path, 100, 7).save()
    held = load_file(tmp_path / INDEX_NAME)
    with safe_open(tmp_path / INDEX_NAME, framework="numpy") as handle:
        metadata = {k: v for k, v in (handle.metadata() | header).items() if v is not None}
    held |= {name: held[name][:-count] for name, count in arrays.items()}
    save_file(held, tmp_path / INDEX_NAME, metadata=metadata)
    with pytest.raises(DataError, match=r"index\.safetensors cannot be read \(.*\); write it again"):
        read_index(tmp_path)
