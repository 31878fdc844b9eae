"""`python -m fcmae.doctor`: finds what would end a run, before it does."""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_module, tiny_run

from fcmae import checkup
from fcmae.checkup import examine
from fcmae.data.index import read_index
from fcmae.data.writer import write_shards
from fcmae.doctor import DoctorConfig
from fcmae.settings import DataConfig, ModelConfig, OptimConfig

sys.path.insert(0, str(Path(__file__).parent / "data"))
from servers import flaky_server


def found(capsys, folder, images=0, seconds=0.0, **data):
    """Whether all was well, and the lines about it."""
    config = DoctorConfig(
        model=ModelConfig(image_size=64),
        data=DataConfig(train=str(folder), workers=0, **data),
        optim=OptimConfig(batch_size=24),
        images=images,
        seconds=seconds,
    )
    good = examine(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == ("everything is in order" if good else "something is wrong, see FAIL above")
    assert good == (not any(line.startswith("FAIL") for line in lines))
    return good, lines


def fails(capsys, folder, **options):
    good, lines = found(capsys, folder, **options)
    assert not good
    return [line.removeprefix("FAIL  ") for line in lines if line.startswith("FAIL")]


@pytest.fixture
def train(shards, tmp_path):
    shutil.copytree(shards / "train", tmp_path / "train")
    return tmp_path / "train"


def test_the_command_takes_those_of_a_run(shards, tmp_path):
    done = run_module("fcmae.doctor", *tiny_run(shards), "images=10", "seconds=0.2", "data.workers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    for line in (
        f"data.train={shards}/train: 72 images in 5 shards",
        f"data.val={shards}/val: 20 images in 2 shards",
        "all shards of data.train are there",
        "data.train: 3 of 3 classes have images",
        "10 images of data.train read and decoded",
        "on one rank with data.workers=1",
        "everything is in order",
    ):
        assert line in done.stdout
    assert not (tmp_path / "runs").exists()
    done = run_module("fcmae.doctor", "data.train=/nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAIL  data.train=/nowhere: no such file or folder" in done.stdout
    for bad in ("images=-1", "seconds=-1", "data.workers=-1", "model.image_size=0", "imags=2"):
        done = run_module("fcmae.doctor", bad, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {bad}")
        assert done.stderr.count("\n") == 1


def test_missing_and_cut_shards_are_all_named(train, capsys):
    index = read_index(train)
    Path(index.source(1)).unlink()
    with open(index.source(3), "r+b") as stream:
        stream.truncate(1000)
    assert fails(capsys, train) == [
        f"{train}/shard-000001.tar cannot be read: there is no such file",
        f"{train}/shard-000003.tar has 1,000 bytes where the index expects {index.shard_bytes[3]:,}",
    ]


def test_broken_images_are_named(train, capsys):
    index = read_index(train)
    for number in (3, 40):
        with open(index.source(index.shard_of(number)), "r+b") as stream:
            stream.seek(index.offset(number))
            stream.write(b"\0" * int(index.size[number]))
    lines = fails(capsys, train, seconds=0.1)
    assert len(lines) == 2
    assert lines[0].endswith("shard-000000.tar: 000003.png cannot be decoded: is in no image format that Pillow knows")
    assert "shard-000002.tar: 000040.png cannot be decoded" in lines[1]
    good, lines = found(capsys, train, images=1)  # which happens to be another
    assert good


def test_labels(train, capsys):
    index = read_index(train)
    index.label = index.label.copy()
    index.label[7] = 5
    (train / "index.safetensors").unlink()
    index.save()
    assert fails(capsys, train) == ["data.train: label 5 with 3 class names"]
    index.label[:] = -1
    index.save()
    good, lines = found(capsys, train)
    assert good
    assert "note  data.train has no labels: enough for pretraining, not for fine-tuning" in lines
    index.label[9] = 0
    index.save()
    good, lines = found(capsys, train)
    assert good
    assert "note  data.train: 71 images have no label" in lines


def array(dtype):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((20, 20, 3), dtype))
    return buffer.getvalue()


def test_arrays_of_several_types_and_channels(tmp_path, capsys):
    types = ["uint8", "uint16"] * 12
    write_shards(((f"{i}", "npy", array(kind), 0) for i, kind in enumerate(types)), tmp_path / "train", classes=["one"])
    assert "holds torch.uint16, other samples torch.uint8" in fails(capsys, tmp_path / "train")[0]


@pytest.mark.parametrize(("dtype", "megabytes"), [("uint8", 5), ("float32", 19)])
def test_shared_memory_of_arrays(tmp_path, capsys, dtype, megabytes):
    images = [(str(i), "npy", array(dtype), 0) for i in range(24)]
    write_shards(images, tmp_path / "train", classes=["one"])
    config = DoctorConfig(data=DataConfig(train=str(tmp_path / "train"), workers=1), seconds=0)
    config.model.image_size, config.optim.batch_size = 256, 6
    examine(config)  # 4 batches × 6 images × 3 × 256 × 256
    assert f"batches of 1 workers take up to {megabytes} MB of shared memory" in capsys.readouterr().out


def test_too_little_shared_memory_and_too_large_a_batch(train, capsys, monkeypatch):
    class Little:
        free = 1000

    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: Little)
    config = DoctorConfig(
        model=ModelConfig(image_size=64),
        data=DataConfig(train=str(train), workers=1),
        optim=OptimConfig(batch_size=100),
        seconds=0.1,
    )
    assert not examine(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert "of shared memory on one rank, 0 MB are free in /dev/shm; use fewer data.workers" in lines[0]
    assert lines[1] == "FAIL  optim.batch_size=100: must be at most the 72 images there are"


def test_slow_loading_is_not_waited_for():
    def batches():
        while True:
            time.sleep(0.05)
            yield {"image": torch.zeros(4, 1)}

    before = time.perf_counter()
    first, count, seconds = checkup._timed(batches(), waiting=1000, seconds=0.4)
    assert time.perf_counter() - before < 3
    assert first >= 0.05
    assert 0 < count / seconds < 4 / 0.05
    assert checkup._timed(iter([{"image": torch.zeros(4, 1)}]), 3, 1.0)[1] == 0


def test_shards_elsewhere(shards, train, tmp_path, capsys):
    shutil.copytree(shards / "val", tmp_path / "val")
    with flaky_server(tmp_path) as server:
        cache = str(tmp_path / "cache")
        good, lines = found(capsys, f"{server.url}/train", cache_dir=cache, seconds=0.1, images=5)
        assert good, lines
        assert any(line.startswith(f"ok    data.val={server.url}/val: 20 images") for line in lines)
        assert any(f"of data.train, {cache} has room for" in line for line in lines)
        (train / "shard-000004.tar").unlink()
        lines = fails(capsys, f"{server.url}/train", cache_dir=cache, cache_gb=1e-5, block_shards=1)
        assert "data.cache_gb=1e-05: must be at least" in lines[0]
        assert lines[1] == f"{server.url}/train/shard-000004.tar cannot be read: there is no such file"


def test_a_cache_that_cannot_be(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "cache")
    lines = fails(capsys, train, read="cache", cache_dir=folder, images=3)
    assert lines[0] == f"data.cache_dir={folder}: cannot be written: Not a directory"
    lines = fails(capsys, train, read="cache", cache_dir=str(tmp_path / "cache"), cache_gb=1e-6, images=3)
    assert "data.cache_gb=1e-06: must be at least 0.001" in lines[0]


def test_speed_of_few_and_many_batches():
    def batches(count):
        for _ in range(count):
            yield {"image": [0] * 5}

    for count, waiting, expected in ((1, 4, 0), (3, 4, 10), (5, 4, 20), (6, 4, 5), (9, 0, 40)):
        first, images, seconds = checkup._timed(batches(count), waiting, 10.0)
        assert (images, first >= 0, seconds > 0) == (expected, True, True)
