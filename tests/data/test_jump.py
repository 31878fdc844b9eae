"""A jump into the middle of an epoch of ImageNet's size opens what the step needs, and takes seconds."""

from __future__ import annotations

import subprocess
import sys

import imagenet
import numpy as np

from fcmae.data.index import ShardIndex, read_index
from fcmae.data.writer import write_shards

SHARDS = 1_282
PROGRAM = """
import sys, time
from fcmae.data.augment import TrainView
from fcmae.data.index import read_index
from fcmae.data.loader import Samples, train_batches
from fcmae.data.reader import ShardReader
from fcmae.data.storage import Storage
from fcmae.data.order import BatchPlan

start = time.perf_counter()
samples = Samples(ShardReader(read_index(sys.argv[1]), Storage(max_open=1000)), TrainView((224, 224)), 3)
plan = BatchPlan(samples.reader.index.shard_samples, 256)
for batch in train_batches(samples, plan, 4000, 4001, int(sys.argv[2])):
    print(time.perf_counter() - start, len(batch["image"]), len(samples.reader._files))
"""


def test_step_4000_of_imagenet(tmp_path):
    """1,282 shards of 1,000 small images: one file under many names."""
    rng = np.random.default_rng(0)
    files = [imagenet.jpeg(rng, imagenet.colour(number)) for number in range(20)]
    one = write_shards(
        ((f"{n:09d}", "jpg", files[n % 20], n % 7) for n in range(1000)), tmp_path / "one", classes=["x"] * 7
    )
    folder = tmp_path / "many"
    folder.mkdir()
    names = [f"shard-{number:06d}.tar" for number in range(SHARDS)]
    for name in names:
        (folder / name).symlink_to(one.source(0))
    ShardIndex(
        folder=folder,
        shards=names,
        shard_samples=np.full(SHARDS, 1000),
        shard_bytes=np.full(SHARDS, one.shard_bytes[0]),
        block=np.tile(one.block, SHARDS),
        size=np.tile(one.size, SHARDS),
        label=np.tile(one.label, SHARDS),
        classes=one.classes,
    ).save()
    assert len(read_index(folder)) == 1_282_000
    for workers in (0, 2):
        command = [sys.executable, "-c", PROGRAM, str(folder), str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, count, opened = map(float, done.stdout.split())
        assert count == 256
        assert seconds < 3
        if workers == 0:
            assert opened <= 32  # a batch lies in one block of 16 shards, or two
