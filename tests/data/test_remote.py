"""Shards elsewhere: the same batches as from a folder, whatever the network does, within a bounded cache."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from conftest import make_split
from servers import flaky_server

from fcmae.data import reader as reader_module
from fcmae.data import storage
from fcmae.data.augment import CentreView, TrainView
from fcmae.data.faults import Faults
from fcmae.data.index import read_index
from fcmae.data.loader import Samples, evaluation_batches, train_batches
from fcmae.data.order import BatchPlan
from fcmae.data.reader import ShardReader
from fcmae.data.storage import Storage
from fcmae.data.writer import write_shards
from fcmae.errors import DataError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)


def collect(location, where=None, workers=0, epochs=2, block_shards=2, faults=None):
    index = read_index(location, where)
    plan = BatchPlan(index.shard_samples, 24, block_shards=block_shards)
    samples = Samples(ShardReader(index, where), TrainView((16, 24)), 3, num_patches=6, visible=2)
    return list(train_batches(samples, plan, 0, epochs * plan.steps_per_epoch, workers, faults))


def same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert set(a) == set(b)
        assert all(torch.equal(a[name], b[name]) for name in a)


class Watched:
    """The largest number of bytes a folder held while the block ran, as a thread saw it."""

    def __init__(self, folder):
        self.folder, self.most, self.stopped = folder, 0, threading.Event()

    def look(self):
        while not self.stopped.is_set():
            total = 0
            for entry in os.scandir(self.folder) if self.folder.exists() else ():
                try:
                    total += entry.stat().st_size if ".tar" in entry.name else 0
                except OSError:
                    continue
            self.most = max(self.most, total)
            time.sleep(0.001)

    def __enter__(self):
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_a_failing_network_are_those_of_the_folder(shards, tmp_path, workers):
    with flaky_server(shards, share=0.6) as server:
        where = Storage(cache_dir=tmp_path / "cache")
        same(collect(f"{server.url}/train", where, workers), collect(shards / "train"))
        assert len(server.failed) == 5  # every kind of failure was met
        # Both epochs from one download of each shard, by whichever process.
        tars = {path: count for path, count in server.served.items() if path.endswith(".tar")}
        assert tars == {f"/train/{name}": 1 for name in read_index(shards / "train").shards}
        before = server.served.total()
        same(collect(f"{server.url}/train", where), collect(shards / "train"))
        assert server.served.total() == before  # the index is known to be the same, the shards are there


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_stays_within_its_limit(tmp_path, workers):
    folder = make_split(tmp_path / "train", 240, per_shard=12)
    sizes = read_index(folder).shard_bytes
    limit = 6 * int(sizes.max())  # three blocks of two shards, of twenty shards
    with flaky_server(tmp_path) as server, Watched(tmp_path / "cache") as watched:
        where = Storage(cache_dir=tmp_path / "cache", cache_bytes=limit, max_open=2)
        same(collect(f"{server.url}/train", where, workers, epochs=3), collect(folder, epochs=3))
    assert limit / 2 < watched.most <= limit
    assert sum(server.served.values()) > 20


def test_shards_are_fetched_before_they_are_wanted(tmp_path):
    folder = make_split(tmp_path / "train", 240, per_shard=12)
    with flaky_server(tmp_path) as server:
        where = Storage(cache_dir=tmp_path / "cache")
        index = read_index(f"{server.url}/train", where)
        plan = BatchPlan(index.shard_samples, 24, block_shards=2)
        reader = ShardReader(index, where)
        reader.expect(plan.shards(0))
        wanted = {f"/train/{index.shards[shard]}" for shard in plan.shards(0)}
        assert len(wanted) == 4  # this block and the next
        deadline = time.monotonic() + 20
        while {path for path in server.served if path.endswith(".tar")} != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        del reader
    assert read_index(folder).shards == index.shards


def test_evaluation_fetches_the_next_shards(shards, tmp_path):
    with flaky_server(shards, share=0.5) as server:
        where = Storage(cache_dir=tmp_path / "cache")
        index = read_index(f"{server.url}/val", where)
        samples = Samples(ShardReader(index, where), CentreView((16, 16)), 3)
        batches = list(evaluation_batches(samples, 6, 0, 1, 2))
        server.served.clear()
        samples = Samples(ShardReader(index, Storage(cache_dir=tmp_path / "other")), CentreView((16, 16)), 3)
        loading = evaluation_batches(samples, 6, 0, 1, 0)
        assert next(loading)["index"].tolist() == list(range(6))  # of the first shard
        deadline = time.monotonic() + 20
        while not server.served["/val/shard-000001.tar"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        loading.close()
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(20))
    local = Samples(ShardReader(read_index(shards / "val")), CentreView((16, 16)), 3)
    same(batches, list(evaluation_batches(local, 6, 0, 1, 0)))


def test_a_shard_that_is_not_there(shards, tmp_path):
    folder = tmp_path / "train"
    index = read_index(make_split(folder, 72))
    (folder / index.shards[2]).unlink()
    with flaky_server(tmp_path) as server:
        where = Storage(cache_dir=tmp_path / "cache")
        with pytest.raises(DataError) as caught:
            collect(f"{server.url}/train", where)
        url = f"{server.url}/train/{index.shards[2]}"
        assert str(caught.value) == f"{url} cannot be read: there is no such file"
        lines = []
        batches = collect(f"{server.url}/train", where, faults=Faults(0.5, lines.append))
        assert len(batches) == 6
        seen = torch.cat([batch["index"] for batch in batches])
        assert not ((seen >= index.first_sample(2)) & (seen < index.first_sample(3))).any()
        assert all(url in line for line in lines[:20])
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("failure", ["503", "reset", "cut", "short"])
def test_a_server_that_never_answers_right(shards, tmp_path, monkeypatch, failure):
    monkeypatch.setattr(storage, "TRIES", 3)
    with flaky_server(shards) as server:
        where = Storage(cache_dir=tmp_path / "cache")
        index = read_index(f"{server.url}/train", where)
        server.failure = lambda path: failure
        reader = ShardReader(index, where)
        with pytest.raises(DataError) as caught:
            reader.read(0)
        message = str(caught.value)
        assert message.startswith(f"{server.url}/train/shard-000000.tar cannot be read, after 3 tries: ")
        assert {"503": "503", "short": "bytes arrived where the index expects"}.get(failure, "") in message
        assert "\n" not in message
        tries = server.failed[failure]
        assert tries >= 3
        with pytest.raises(DataError, match="after 3 tries"):
            reader.read(1)
        assert server.failed[failure] == tries  # it is not asked again for every sample
    assert not list((tmp_path / "cache").glob("*.part"))


def test_an_index_that_was_written_anew_is_fetched_anew(tmp_path):
    make_split(tmp_path / "a" / "train", 24)
    make_split(tmp_path / "b" / "train", 48)
    with flaky_server(tmp_path / "a") as server:
        where = Storage(cache_dir=tmp_path / "cache")
        assert len(read_index(f"{server.url}/train", where)) == 24
        server.folder = tmp_path / "b"
        os.utime(tmp_path / "b" / "train" / "index.safetensors", (1, 1))
        assert len(read_index(f"{server.url}/train/index.safetensors", where)) == 48
        assert len(list(where.cache_dir.glob("index-*"))) == 1  # the one of before is gone


def test_reading_ahead_and_copying_give_the_same_batches(shards, tmp_path):
    expected = collect(shards / "train")
    for read in ("ahead", "cache"):
        where = Storage(read, tmp_path / "cache")
        same(collect(shards / "train", where, workers=0), expected)
        assert (tmp_path / "cache").exists() == (read == "cache")
        same(collect(shards / "train", where, workers=2), expected)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 5


def test_a_full_disk_ends_at_once(shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    index = read_index(shards / "train")
    monkeypatch.setattr(storage.shutil, "copyfile", full)
    with pytest.raises(DataError, match=r"shard-000000\.tar cannot be read: No space left on device"):
        ShardReader(index, Storage("cache", tmp_path / "cache")).read(0)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_samples_are_found_by_their_offsets(shards, tmp_path):
    local = ShardReader(read_index(shards / "train"))
    copied = ShardReader(local.index, Storage("cache", tmp_path / "cache", max_open=1))
    for number in np.random.default_rng(0).integers(72, size=40).tolist():
        assert copied.read(number) == local.read(number)
        assert copied.name(number) == f"{number:06d}.png"


def test_processes_share_the_reading_ahead(shards, monkeypatch):
    read = []
    monkeypatch.setattr(reader_module, "_read_through", read.append)
    index = read_index(shards / "train")
    readers = [ShardReader(index, Storage("ahead")) for _ in range(3)]
    for part, reader in enumerate(readers):
        reader.expect([4, 3, 2, 1, 0], part, 3)
        reader.expect([4, 3, 2, 1, 0], part, 3)  # nothing new
    deadline = time.monotonic() + 20
    while len(read) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(read) == [index.source(shard) for shard in range(5)]
    assert read.index(index.source(3)) < read.index(index.source(0))  # of process 0, in the order of use
    threads = [reader._ahead.thread for reader in readers]
    assert all(thread.is_alive() for thread in threads)
    del readers, reader
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()  # threads end with their readers


def test_reading_ahead_reads_a_shard_once(tmp_path, monkeypatch):
    index = read_index(make_split(tmp_path / "train", 240, per_shard=12))
    read = []
    monkeypatch.setattr(reader_module, "_read_through", read.append)
    reader, plan = ShardReader(index, Storage("ahead")), BatchPlan(index.shard_samples, 12, block_shards=2)
    for number in range(plan.steps_per_epoch - 2):
        reader.expect(plan.shards(number))
        while reader._ahead.jobs:
            time.sleep(0.001)
    del reader
    assert sorted(read) == [index.source(shard) for shard in range(20)]


def test_who_needs_room_waits_until_others_have_read(shards, tmp_path, monkeypatch):
    index = read_index(shards / "train")
    where = Storage("cache", tmp_path / "cache", 2 * int(index.shard_bytes.max()))
    first, second = ShardReader(index, where), ShardReader(index, where)
    for shard in (0, 1):
        first.read(index.first_sample(shard))
    monkeypatch.setattr(reader_module, "PATIENCE", 0.1)
    with pytest.raises(DataError, match="is full of shards that are being read"):
        second.read(index.first_sample(2))
    samples = Samples(second, CentreView((16, 16)), 3)
    with pytest.raises(DataError, match="is full of shards"):  # which is no fault of the sample
        samples.batch(0, np.array([index.first_sample(2)]), [], lambda epoch, sample, attempt: 0)
    monkeypatch.setattr(reader_module, "PATIENCE", 60)
    got = []
    thread = threading.Thread(target=lambda: got.append(second.read(index.first_sample(2))))
    thread.start()
    time.sleep(0.2)
    assert not got
    first.release()
    thread.join(timeout=20)
    assert got == [ShardReader(index).read(index.first_sample(2))]

    def batch(reader, shard):
        reader.read(index.first_sample(shard))
        reader.release()

    # Two that each hold one and want another: both let go of their own while they wait.
    first.read(index.first_sample(3))
    second.read(index.first_sample(2))
    threads = [threading.Thread(target=batch, args=pair) for pair in ((first, 4), (second, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_batches_leave_the_cache_free(shards, tmp_path):
    index = read_index(shards / "train")
    reader = ShardReader(index, Storage("cache", tmp_path / "cache"))
    Samples(reader, CentreView((16, 16)), 3).batch(0, np.arange(40))
    assert not reader._files
    local = ShardReader(index)
    Samples(local, CentreView((16, 16)), 3).batch(0, np.arange(40))
    assert len(local._files) == 3


def test_a_damaged_copy_is_named(shards, tmp_path):
    index = read_index(shards / "train")
    where = Storage("cache", tmp_path / "cache")
    ShardReader(index, where).read(0)
    copy = next((tmp_path / "cache").glob("*shard-000000.tar"))
    copy.write_bytes(bytes(copy.stat().st_size))
    with pytest.raises(DataError) as caught:
        ShardReader(index, where).read(0)
    assert f"remove its copy {copy}, or, if it was right, write the shards and their index again" in str(caught.value)
    copy.unlink()
    assert ShardReader(index, where).read(0)


def test_a_server_that_cannot_be_reached_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TRIES", 2)
    with pytest.raises(DataError, match="after 2 tries: Connect call failed"):
        read_index("http://127.0.0.1:9/train", Storage(cache_dir=tmp_path))
    with flaky_server(tmp_path) as server:
        make_split(tmp_path / "val", 12)
        server.failure = lambda path: "503"
        with pytest.raises(DataError, match="after 2 tries: the server answers 503"):
            read_index(f"{server.url}/val", Storage(cache_dir=tmp_path))
        with pytest.raises(DataError, match="after 2 tries: the server answers 503"):
            storage.exists(f"{server.url}/val/index.safetensors")  # which is not the same as no
        server.failure = lambda path: None
        assert storage.exists(f"{server.url}/val/index.safetensors")


@pytest.mark.parametrize("remote", [True, False])
def test_other_images_of_the_same_size_are_fetched_anew(tmp_path, remote):
    def write(value):
        shutil.rmtree(tmp_path / "train", ignore_errors=True)
        buffer = io.BytesIO()
        np.save(buffer, np.full((16, 16, 3), value, np.uint8))
        write_shards(((f"{i}", "npy", buffer.getvalue(), 0) for i in range(8)), tmp_path / "train", classes=["one"])
        os.utime(tmp_path / "train" / "index.safetensors", (value, value))

    with flaky_server(tmp_path) as server:
        where = Storage("cache", tmp_path / "cache")
        for value in (100, 200):
            write(value)
            index = read_index(f"{server.url}/train" if remote else tmp_path / "train", where)
            image = Samples(ShardReader(index, where), CentreView((16, 16)), 3).batch(0, np.arange(8))["image"]
            assert (image == value).all()


def test_a_copy_of_the_wrong_size_is_fetched_anew(shards, tmp_path):
    with flaky_server(shards) as server:
        where = Storage(cache_dir=tmp_path / "cache")
        index = read_index(f"{server.url}/train", where)
        ShardReader(index, where).read(0)
        copy = next((tmp_path / "cache").glob("*shard-000000.tar"))
        os.truncate(copy, 700)
        assert ShardReader(index, where).read(0) == ShardReader(read_index(shards / "train")).read(0)
        copy = next((tmp_path / "cache").glob("index-*"))
        os.truncate(copy, 100)
        with pytest.raises(
            DataError, match=rf"{server.url}/train/index\.safetensors: index.safetensors cannot be read"
        ):
            read_index(f"{server.url}/train", where)
        assert len(read_index(f"{server.url}/train", where)) == 72


def test_names_of_shards_are_quoted_for_the_web(shards, tmp_path):
    shutil.copytree(shards / "val", tmp_path / "val")
    index = read_index(tmp_path / "val")
    (tmp_path / "val" / index.shards[0]).rename(tmp_path / "val" / "a b#1?.tar")
    index.shards = ["a b#1?.tar", *index.shards[1:]]
    (tmp_path / "val" / "index.safetensors").unlink()
    index.save()
    with flaky_server(tmp_path) as server:
        where = Storage(cache_dir=tmp_path / "cache")
        assert ShardReader(read_index(f"{server.url}/val", where), where).read(0)
