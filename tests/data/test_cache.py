"""A bounded folder of shards: what is being read stays, what died is taken over, what is old goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fcmae.data.cache import Shard, ShardCache
from fcmae.errors import DataError


@pytest.fixture
def shards(tmp_path):
    """Six files of 1,000 bytes, described."""
    made = []
    for number in range(6):
        path = tmp_path / "from" / f"shard-{number}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * 1000)
        made.append(Shard(str(path), 1000, f"content {number}"))
    return made


def held(cache):
    return sorted(path.name.rsplit("-", 1)[1] for path in cache.folder.glob("*.tar"))


def test_what_was_not_used_for_longest_goes(shards, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3000)
    for number, shard in enumerate(shards[:3]):
        cache.fetch(shard)
        os.utime(cache.folder / shard.file, (number, number))
    os.close(cache.open(shards[0]))  # used again, now the latest
    cache.fetch(shards[3])
    assert held(cache) == ["0.tar", "2.tar", "3.tar"]
    # Neither what is kept nor what is being read makes room.
    reading = cache.open(shards[2])
    cache.fetch(shards[4], keep=[shards[0].file, shards[3].file])
    assert held(cache) == ["0.tar", "2.tar", "3.tar"]
    assert os.pread(reading, 5, 0) == bytes([2] * 5)
    cache.fetch(shards[4])
    assert held(cache) == ["2.tar", "3.tar", "4.tar"]
    os.close(reading)
    assert not list(cache.folder.glob("*.part"))


def test_a_cache_full_of_what_is_being_read(shards, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2500)
    open_files = [cache.open(shard) for shard in shards[:2]]
    with pytest.raises(
        DataError, match=r"data\.cache_gb=2.5e-06: the cache .* is full of shards that are being read; no"
    ):
        cache.open(shards[2])
    os.close(open_files.pop())
    open_files.append(cache.open(shards[2]))
    assert held(cache) == ["0.tar", "2.tar"]
    for descriptor in open_files:
        os.close(descriptor)


def test_a_shard_larger_than_the_cache(shards, tmp_path):
    with pytest.raises(DataError, match=r"data\.cache_gb=5e-07: is less than one shard, 1e-06 GB"):
        ShardCache(tmp_path / "cache", 500).open(shards[0])


def test_another_content_is_another_file(shards, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**6)
    os.close(cache.open(shards[0]))
    again = Shard(shards[0].location, 1000, "another content")
    assert again.file != shards[0].file
    os.close(cache.open(again))
    assert held(cache) == ["0.tar", "0.tar"]
    odd = Shard("pipe:cat '/tmp/a b/x.tar' | cat", 1000, "")
    assert set(odd.file) <= set("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._-")


def test_threads_and_processes_download_once(shards, tmp_path):
    log = tmp_path / "log"
    shard = Shard(f"pipe:echo asked >> {log}; sleep 0.3; cat {shards[1].location}", 1000, "")
    cache = ShardCache(tmp_path / "cache", 10**6)
    program = (
        "import os, sys; from fcmae.data.cache import Shard, ShardCache; from pathlib import Path; "
        "d = ShardCache(Path(sys.argv[1]), 10**6).open(Shard(sys.argv[2], 1000, '')); "
        "assert os.pread(d, 2000, 0) == b'\\1' * 1000"
    )
    others = [subprocess.Popen([sys.executable, "-c", program, str(cache.folder), shard.location]) for _ in range(3)]
    threads = [threading.Thread(target=cache.fetch, args=(shard,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    descriptor = cache.open(shard)
    assert os.pread(descriptor, 2000, 0) == b"\1" * 1000
    os.close(descriptor)
    for thread in threads:
        thread.join()
    assert [process.wait(timeout=60) for process in others] == [0, 0, 0]
    assert log.read_text() == "asked\n"


def test_the_download_of_a_killed_process_is_taken_over(shards, tmp_path):
    location = shards[2].location
    shard = Shard(f"pipe:test -e {tmp_path}/second || head -c 400 {location}; touch {tmp_path}/second; "
                  f"test -e {tmp_path}/killed || sleep 60; cat {location}", 1000, "")  # fmt: skip
    cache = ShardCache(tmp_path / "cache", 10**6)
    program = (
        "import sys; from fcmae.data.cache import Shard, ShardCache; from pathlib import Path; "
        "ShardCache(Path(sys.argv[1]), 10**6).open(Shard(sys.argv[2], 1000, ''))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(cache.folder), shard.location], start_new_session=True
    )
    part = cache.folder / (shard.file + ".part")
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size != 400:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    cache.fetch(shard)  # returns: another process is at it
    assert not (cache.folder / shard.file).exists()
    (tmp_path / "killed").touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    descriptor = cache.open(shard)
    assert os.pread(descriptor, 2000, 0) == b"\2" * 1000
    os.close(descriptor)
    assert not part.exists()


def test_what_a_killed_process_left_makes_room(shards, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2000)
    cache.fetch(shards[0])
    (cache.folder / (shards[1].file + ".part")).write_bytes(b"half")
    os.utime(cache.folder / (shards[1].file + ".part"), (1, 1))
    (cache.folder / "index-0.safetensors").write_bytes(b"not a shard")
    cache.fetch(shards[2])
    assert held(cache) == ["0.tar", "2.tar"]
    assert not list(cache.folder.glob("*.part"))
    assert (cache.folder / "index-0.safetensors").exists()
