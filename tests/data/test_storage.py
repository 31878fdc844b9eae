"""Locations: object stores, commands, and names that lead elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_module, tiny_run

from fcmae.data import storage
from fcmae.data.augment import CentreView
from fcmae.data.index import read_index
from fcmae.data.loader import Samples, evaluation_batches
from fcmae.data.reader import ShardReader
from fcmae.data.storage import Storage
from fcmae.errors import DataError


def images(location, where=None, workers=0):
    index = read_index(location, where)
    samples = Samples(ShardReader(index, where), CentreView((16, 16)), 3)
    return torch.cat([batch["image"] for batch in evaluation_batches(samples, 8, 0, 1, workers)])


@pytest.fixture(scope="module")
def s3(shards):
    """An S3 server (moto) with the shards in a bucket; its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
        ):
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in sorted(shards.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "images", f"mine/{path.relative_to(shards)}")
        yield client
        server.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_s3(s3, shards, tmp_path, workers):
    where = Storage(cache_dir=tmp_path / "cache")
    assert torch.equal(images("s3://images/mine/train", where, workers), images(shards / "train"))
    assert storage.size_of("s3://images/mine/train/shard-000000.tar") == read_index(shards / "train").shard_bytes[0]
    assert storage.exists("s3://images/mine/val/index.safetensors")
    assert not storage.exists("s3://images/mine/test/index.safetensors")
    with pytest.raises(DataError, match=r"s3://images/none/index\.safetensors cannot be read: there is no such file"):
        read_index("s3://images/none", where)


def test_a_run_from_s3(s3, shards, tmp_path):
    options = ["data.train=s3://images/mine/train", f"data.cache_dir={tmp_path / 'cache'}", "data.workers=1"]
    done = run_module("fcmae.pretrain", *tiny_run(shards, *options, "run.dir=run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    local = run_module("fcmae.pretrain", *tiny_run(shards, "run.dir=local"), cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    runs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "local")]
    assert [json.loads(line)["loss"] for line in runs[0]] == [json.loads(line)["loss"] for line in runs[1]]


def test_a_truncated_object(s3, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "TRIES", 2)
    for path in (shards / "val").iterdir():
        s3.upload_file(str(path), "images", f"cut/{path.name}")
    s3.put_object(Bucket="images", Key="cut/shard-000000.tar", Body=b"half")
    with pytest.raises(DataError, match="after 2 tries: 4 bytes arrived where the index expects"):
        images("s3://images/cut", Storage(cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize(("location", "package"), [("s3://b", "s3fs"), ("https://h/x", "aiohttp"), ("gs://b", "gcsfs")])
def test_a_package_that_is_missing_is_named(tmp_path, location, package):
    program = (
        "import sys; sys.modules[sys.argv[2]] = None; from fcmae.data.index import read_index; read_index(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, location, package], capture_output=True, text=True, timeout=60
    )
    expected = f"DataError: {location}/index.safetensors: {package} is needed; pip install 'fcmae[remote]'"
    assert done.stderr.splitlines()[-1].endswith(expected)


def test_commands(shards, tmp_path):
    location = f"pipe:cat {shards / 'train'}/{{}}"
    where = Storage(cache_dir=tmp_path / "cache", allow_pipe=True)
    assert torch.equal(images(location, where, 1), images(shards / "train"))
    with pytest.raises(DataError, match=r"pipe:cat .*: commands are only run with data\.allow_pipe=true"):
        read_index(location, Storage(cache_dir=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(DataError, match=r"must have \{\} where the name of a file goes"):
        read_index("pipe:cat x", where)


def test_a_command_that_fails(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "TRIES", 2)
    index = read_index(shards / "train")
    index.shards = [f"pipe:echo the host is gone >&2; exit 3; {name}" for name in index.shards]
    reader = ShardReader(index, Storage(cache_dir=tmp_path / "cache", allow_pipe=True))
    with pytest.raises(DataError, match="after 2 tries: the command ended with 3: the host is gone"):
        reader.read(0)


@pytest.mark.parametrize(
    "name", ["pipe:touch {}/ran", "../train/shard-000000.tar", "/etc/passwd", "~/x", "ftp://h/x.tar"]
)
def test_an_index_from_elsewhere_may_not_reach_beyond_it(shards, tmp_path, name):
    from servers import flaky_server

    shutil.copytree(shards / "val", tmp_path / "web" / "val")
    index = read_index(tmp_path / "web" / "val")
    index.shards = [name.format(tmp_path), *index.shards[1:]]
    (tmp_path / "web" / "val" / "index.safetensors").unlink()
    index.save()
    allowed = r"data\.allow_pipe=true" if "ftp" not in name else "must be a path or begin with"
    with flaky_server(tmp_path / "web") as server, pytest.raises(DataError, match=allowed):
        read_index(f"{server.url}/val", Storage(cache_dir=tmp_path / "cache"))
    if name.startswith(("pipe", "ftp")):
        with pytest.raises(DataError, match=allowed):
            read_index(tmp_path / "web" / "val")
    else:  # of this machine's files an index on it may name any
        assert read_index(tmp_path / "web" / "val").shards[0] == name
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/etc/cron.d/job.png", "../../job.png", "a/../../job.png"])
def test_members_with_unsafe_names_are_refused(shards, tmp_path, name):
    shutil.copytree(shards / "val", tmp_path / "val")
    index = read_index(tmp_path / "val")
    with open(index.source(0), "r+b") as stream:
        stream.seek(index.offset(3) - 512)
        stream.write(name.encode().ljust(100, b"\0"))
    reader = ShardReader(index)
    assert reader.read(2)
    with pytest.raises(DataError) as caught:
        reader.read(3)
    assert str(caught.value) == f"{index.source(0)}: {name}: such names are only taken with data.allow_pipe=true"
    allowed = ShardReader(index, Storage(allow_pipe=True))
    assert allowed.read(3) == ShardReader(read_index(shards / "val")).read(3)
    assert sorted(os.listdir(tmp_path)) == ["val"]


def test_names_with_dots_that_lead_nowhere_are_taken(shards, tmp_path):
    shutil.copytree(shards / "val", tmp_path / "val")
    index = read_index(tmp_path / "val")
    with open(index.source(0), "r+b") as stream:
        stream.seek(index.offset(0) - 512)
        stream.write(b"a..b.png".ljust(100, b"\0"))
    assert ShardReader(index).read(0)


def test_pauses_grow_and_end(monkeypatch):
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def fail():
        raise ConnectionResetError("gone")

    with pytest.raises(DataError, match="x cannot be read, after 8 tries: gone"):
        storage._tried("x", fail)
    assert len(pauses) == 7
    for number, pause in enumerate(pauses):
        assert 0.75 <= pause / (0.5 * 2**number) <= 1.25 or 22 < pause <= 38
    state = np.random.get_state()[1].sum(), torch.get_rng_state().sum()  # noqa: NPY002
    with pytest.raises(DataError):
        storage._tried("x", fail)
    assert (np.random.get_state()[1].sum(), torch.get_rng_state().sum()) == state  # noqa: NPY002


def test_locations():
    for location, remote in (
        ("shards/train", False), ("/a/b", False), ("s3://b/c", True), ("pipe:cat", True), ("C:/x", False),
    ):  # fmt: skip
        assert storage.is_remote(location) == remote
    assert storage.join("https://h/x/", "y.tar") == "https://h/x/y.tar"
    assert storage.join("https://h/x", "s3://b/y.tar") == "s3://b/y.tar"
    assert storage.join("pipe:cat /a/{}", "y z.tar") == "pipe:cat /a/'y z.tar'"
    assert Path("~").expanduser() in storage.default_cache().parents or "XDG_CACHE_HOME" in os.environ
