"""Indices of shards that others made."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from conftest import png, run_module, tiny_run
from servers import flaky_server

from fcmae.data import index_shards
from fcmae.data.augment import CentreView
from fcmae.data.index import read_index
from fcmae.data.index_shards import main
from fcmae.data.loader import Samples
from fcmae.data.reader import ShardReader
from fcmae.data.storage import Storage


def images(folder, where=None):
    samples = Samples(ShardReader(read_index(folder, where), where), CentreView((16, 16)), 3)
    return samples.batch(0, np.arange(len(samples.reader.index)))


def written(folder, samples):
    """Shards as webdataset's own writer makes them."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "part-%04d.tar"), maxcount=8, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def sample(number, **more):
    rng = np.random.default_rng(number)
    return {"__key__": f"folder.v1/{number:04d}", "png": png(rng), "cls": number % 3, **more}


@pytest.fixture
def foreign(tmp_path):
    """Twenty samples in three shards, each with a text and its label in a json as well."""
    rows = (sample(i, txt=f"image {i}", json={"label": (i + 1) % 3}) for i in range(20))
    return written(tmp_path / "foreign", rows)


def test_shards_of_webdatasets_writer(foreign, tmp_path, capsys):
    assert main([str(foreign), "--jobs", "2"]) == 0
    assert "20 images in 3 shards, 20 with a label, 3 classes" in capsys.readouterr().out
    index = read_index(foreign)
    assert index.shards == ["part-0000.tar", "part-0001.tar", "part-0002.tar"]
    assert index.classes == ["0", "1", "2"]
    assert index.extensions == [".png"]
    expected = webdataset.WebDataset([index.source(i) for i in range(3)], shardshuffle=False)
    reader = ShardReader(index)
    for number, row in enumerate(expected):
        assert reader.read(number) == row["png"]
        assert reader.name(number) == f"{row['__key__']}.png"
        assert index.label[number] == int(row["cls"])
    assert number == 19
    assert main([str(foreign)]) == 2
    assert "already holds an index" in capsys.readouterr().err


def test_an_index_elsewhere_labels_from_json_and_names(foreign, tmp_path):
    (tmp_path / "names").write_text("disc\nring\nstar\n")
    options = ["--out", str(tmp_path / "mine"), "--label-key", "label", "--classes", str(tmp_path / "names")]
    assert main([f"{foreign}/part-{{0001..0002}}.tar", f"{foreign}/part-0000.tar", *options]) == 0
    index = read_index(tmp_path / "mine")
    assert index.shards == [str(foreign / f"part-000{i}.tar") for i in (1, 2, 0)]
    assert index.classes == ["disc", "ring", "star"]
    assert index.label.tolist() == [(i + 1) % 3 for i in [*range(8, 20), *range(8)]]
    assert sorted(path.name for path in foreign.iterdir()) == [f"part-000{i}.tar" for i in range(3)]
    index.check_files()


def test_a_run_from_foreign_shards(foreign, tmp_path):
    done = run_module("fcmae.data.index_shards", str(foreign), "--out", str(tmp_path / "train"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_module("fcmae.pretrain", *tiny_run(tmp_path, "optim.batch_size=10"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_shards_elsewhere(foreign, tmp_path, monkeypatch):
    assert main([str(foreign), "--out", str(tmp_path / "local")]) == 0
    with flaky_server(tmp_path, share=0.3) as server:
        urls = f"{server.url}/foreign/part-{{0000..0002}}.tar"
        assert main([urls, "--out", str(tmp_path / "index"), "--jobs", "2"]) == 0
        where = Storage(cache_dir=tmp_path / "cache")
        batch = images(tmp_path / "index", where)
    assert torch.equal(batch["image"], images(tmp_path / "local")["image"])
    command = [f"pipe:cat {foreign}/part-0000.tar", "--out", str(tmp_path / "piped")]
    assert main(command) == 2
    assert main([*command, "--allow-pipe"]) == 0
    assert len(images(tmp_path / "piped", Storage(cache_dir=tmp_path / "cache", allow_pipe=True))["image"]) == 8


def test_folders_of_headers_and_long_names(tmp_path):
    (tmp_path / "shards").mkdir()
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "shards" / f"{kind}.tar", "w", format=kind) as archive:
            archive.addfile(tarfile.TarInfo("folder/"))
            longest = 80 if kind == tarfile.USTAR_FORMAT else 200
            for number in range(3):
                data = png(np.random.default_rng(number))
                member = tarfile.TarInfo(f"./{str(number) * longest}.image.PNG")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    assert main([str(tmp_path / "shards")]) == 0
    index = read_index(tmp_path / "shards")
    assert len(index) == 9
    assert index.label.max() == -1
    assert index.classes == []
    reader = ShardReader(index)
    assert [reader.read(i) for i in range(9)] == 3 * [png(np.random.default_rng(n)) for n in range(3)]


def tar(path, *files):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


PNG = png(np.random.default_rng(0))


def test_one_image_of_several_is_chosen(tmp_path):
    tar(
        tmp_path / "s" / "x.tar",
        ("a.depth.png", b"depth"),
        ("a.RGB.png", PNG),
        ("b.depth.png", b"d"),
        ("b.rgb.png", PNG),
    )
    assert main([str(tmp_path / "s"), "--image", ".rgb.PNG"]) == 0
    index = read_index(tmp_path / "s")
    assert [ShardReader(index).read(i) for i in range(len(index))] == [PNG, PNG]
    assert index.extensions == [".png"]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([("a.txt", b"x")], [], "sample a has no image among its files txt"),
        ([("a.png", PNG), ("a.jpg", PNG)], [], "has 2 images among its files png, jpg; choose one with --image"),
        ([("a.png", PNG)], ["--image", "rgb.png"], "sample a has no rgb.png among its files png"),
        ([("a.png", PNG), ("a.cls", b"cat")], [], "sample a: its .cls holds 'cat', not a number from 0 on"),
        ([("a.png", PNG), ("a.cls", b"-2")], [], "sample a: its .cls holds '-2', not a number from 0 on"),
        ([("a.png", PNG), ("a.json", b'{"b": 1}')], ["--label-key", "c"], "not a number at c from 0 on"),
        ([("a.png", PNG), ("a.json", json.dumps({"c": 1.5}).encode())], ["--label-key", "c"], "not a number at c"),
        ([("/etc/a.png", PNG)], [], "/etc/a.png: such names are only taken with --allow-pipe"),
        ([("../a.png", PNG)], [], "../a.png: such names are only taken with --allow-pipe"),
        ([], [], "there is no sample in these shards"),
        ([("a.png", PNG), ("a.cls", b"7")], ["--classes", "/dev/null"], "labels up to 7, and 0 class names"),
    ],
)
def test_what_cannot_be_indexed_is_named(tmp_path, capsys, files, options, message):
    tar(tmp_path / "s" / "x.tar", *files)
    assert main([str(tmp_path / "s"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s" / "index.safetensors").exists()


def test_arguments_that_mean_nothing(foreign, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_bytes(b"no tar at all")
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz"):
        pass
    shutil.copy(foreign / "part-0000.tar", tmp_path / "cut.tar")
    with open(tmp_path / "cut.tar", "r+b") as stream:
        stream.truncate(3000)
    for arguments, message in (
        (["nothing"], "nothing: no such file or folder"),
        ([str(tmp_path / "empty")], "holds no .tar files"),
        ([str(tmp_path / "text.tar")], "text.tar: is no complete, uncompressed tar"),
        ([str(tmp_path / "small.tar.gz")], "small.tar.gz: is no complete, uncompressed tar"),
        ([str(tmp_path / "cut.tar")], "cut.tar: is no complete, uncompressed tar"),
        (["s3://bucket/x.tar"], "say with --out where the index goes"),
        (["ftp://host/x.tar", "--out", str(tmp_path)], "must be a path or begin with http://"),
        ([str(foreign), "--classes", "nothing"], "nothing"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, error
    for option, value, message in (
        ("--jobs", "0", "--jobs=0: must be at least 1"),
        ("--image", "txt", "--image=txt: must end in one of jpg, jpeg, png,"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(foreign), option, value])
        assert message in capsys.readouterr().err


def test_damaged_shards_are_not_taken_for_shorter_ones(foreign, capsys):
    whole = (foreign / "part-0001.tar").read_bytes()
    with tarfile.open(foreign / "part-0001.tar") as archive:
        header = archive.getmembers()[8].offset  # of the third sample
    for damaged in (
        whole[: header + 2] + b"\xff\xff" + whole[header + 4 :],
        whole[: header + 100],
        whole[:header],
    ):
        (foreign / "part-0001.tar").write_bytes(damaged)
        assert main([str(foreign)]) == 2
        assert f"{foreign}/part-0001.tar: is no complete, uncompressed tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE], ids=["hard", "soft", "sparse"]
)
def test_images_without_their_bytes_are_not_passed_over(tmp_path, capsys, kind):
    (tmp_path / "s").mkdir()
    with tarfile.open(tmp_path / "s" / "x.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, type in (("a.png", tarfile.REGTYPE), ("b.png", kind)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = type, "a.png" if type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            member.size = len(PNG) if type == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(PNG))
    assert main([str(tmp_path / "s")]) == 2
    assert "b.png is a link or a sparse file; pack it with tar --dereference" in capsys.readouterr().err


def test_a_process_ended_from_outside_is_one_line(foreign, capsys, monkeypatch):
    monkeypatch.setattr(index_shards, "_scanned", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert main([str(foreign), "--jobs", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: a process that reads was ended from outside")


def test_capital_extensions_and_links(tmp_path, capsys):
    tar(tmp_path / "blobs" / "1", ("a.PNG", PNG), ("a.CLS", b"1"), ("b.png", PNG), ("b.cls", b"0"))
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x.tar").symlink_to(tmp_path / "blobs" / "1")
    assert main([str(tmp_path / "snapshot")]) == 0
    index = read_index(tmp_path / "snapshot")
    assert index.shards == ["x.tar"]
    assert index.label.tolist() == [1, 0]
    assert not (tmp_path / "blobs" / "index.safetensors").exists()
    capsys.readouterr()
    for arguments, message in (
        (["x{0..3}{"], "nbalanced"),
        (
            ["--out", "s3://bucket/ix", str(tmp_path / "snapshot")],
            "--out=s3://bucket/ix: must be a folder of this machine",
        ),
        (["--out", str(tmp_path / "o"), "pipe:cat x"], "pipe: commands are only run with --allow-pipe"),
        (["--out", str(tmp_path / "o"), "S3://b/x.tar"], "must be a path or begin with http://"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
