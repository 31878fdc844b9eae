"""The same global batches, pixel by pixel, from 1, 2 and 4 real processes with any number of workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, json, os, sys
from fcmae.data.augment import TrainView
from fcmae.data.index import read_index
from fcmae.data.loader import Samples, train_batches
from fcmae.data.reader import ShardReader
from fcmae.data.order import BatchPlan

folder, out, accumulate, start, stop = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
index = read_index(folder)
plan = BatchPlan(index.shard_samples, 24, accumulate, rank, ranks, seed=5, block_shards=2)
samples = Samples(ShardReader(index), TrainView((16, 24)), 3, 5, 6, 2)
seen = {}
for workers in (0, 1, 3):
    rows = []
    for batch in train_batches(samples, plan, start * accumulate, stop * accumulate, workers):
        one_by_one = zip(batch["index"].tolist(), batch["image"], batch["visible"].tolist())
        rows.append([(i, hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest(), v) for i, x, v in one_by_one])
    seen[workers] = rows
with open(f"{out}/{rank}.json", "w") as file:
    json.dump(seen, file)
"""


def global_batches(folder, out, ranks: int, accumulate: int, start: int, stop: int) -> dict[str, list]:
    """By number of workers: what each step saw, over all ranks and micro-batches, as torchrun's processes wrote it."""
    out.mkdir()
    program = out / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(program),
         str(folder), str(out), str(accumulate), str(start), str(stop)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {
        workers: [
            [row for micro in range(accumulate) for part in parts for row in part[workers][step * accumulate + micro]]
            for step in range(stop - start)
        ]
        for workers in parts[0]
    }


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """Three epochs of three steps, seen by one process."""
    return global_batches(shards / "train", tmp_path_factory.mktemp("one") / "out", 1, 1, 0, 9)


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 3), (2, 1), (4, 2)])
def test_order_crops_and_masks_do_not_depend_on_processes(reference, shards, tmp_path, ranks, accumulate):
    expected = reference["0"]
    assert len(expected) == 9
    assert all(len(step) == 24 for step in expected)
    assert all(batches == expected for batches in reference.values())
    # From the middle of the second epoch on: the number of ranks may change there.
    others = global_batches(shards / "train", tmp_path / "out", ranks, accumulate, 4, 9)
    assert set(others) == {"0", "1", "3"}
    assert all(batches == expected[4:] for batches in others.values())
