"""Sources that change or go away while they are packed, damaged images, and interruptions at the very end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import png
from test_jpeg import encoded

from fcmae.data import packing
from fcmae.data.index import ShardIndex, read_index
from fcmae.data.make_shards import main
from fcmae.data.packing import JOURNAL
from fcmae.data.reader import ShardReader


@pytest.fixture
def source(tmp_path):
    """60 images in two classes."""
    folder = tmp_path / "source"
    for number in range(60):
        path = folder / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.random.default_rng(number), height=24 + number % 7))
    return folder


def before_shard(monkeypatch, number, action):
    """Do something before a shard is written, once."""
    write = packing.write_shard

    def write_shard(path, samples):
        if path.name.endswith(f"-{number:06d}.tar"):
            monkeypatch.setattr(packing, "write_shard", write)
            action()
        return write(path, samples)

    monkeypatch.setattr(packing, "write_shard", write_shard)


def stored(folder):
    reader = ShardReader(read_index(folder))
    return [reader.read(number) for number in range(len(reader.index))]


def stop():
    raise KeyboardInterrupt


def test_a_source_that_goes_away_ends_the_run_and_back_again_continues(source, tmp_path, monkeypatch, capsys):
    arguments = [str(source), str(tmp_path / "out"), "--samples-per-shard", "10", "--jobs", "1"]
    before_shard(monkeypatch, 2, lambda: source.rename(tmp_path / "away"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: [Errno 2] No such file or directory: ")
    assert error.endswith(".png'; the same command goes on from here\n")
    assert not (tmp_path / "out" / "index.safetensors").exists()
    (tmp_path / "away").rename(source)
    assert main(arguments) == 0
    assert sorted(stored(tmp_path / "out")) == sorted(path.read_bytes() for path in source.rglob("*.png"))


def test_links_to_nothing_are_left_out(source, tmp_path, capsys):
    (source / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert "left out: a/gone.png: is a link to nothing" in capsys.readouterr().out
    assert len(read_index(tmp_path / "out")) == 60


def test_files_that_change_size_do_not_shift_the_others(source, tmp_path, monkeypatch, capsys):
    arguments = [str(source), str(tmp_path / "out"), "--shard-bytes", "20000", "--jobs", "1"]
    before_shard(monkeypatch, 3, stop)
    assert main(arguments) == 130
    order = np.random.default_rng(0).permutation(60)
    changed = sorted(source.rglob("*.png"))[order[12]]
    changed.write_bytes(changed.read_bytes() + bytes(3000))  # its shard and those after it now end elsewhere
    capsys.readouterr()
    assert main(arguments) == 2
    assert "holds the beginnings of shards from another source" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["--jobs=1", "--max-side=64"])
def test_damage_that_pillow_passes_over_is_named(tmp_path, capsys, how):
    (tmp_path / "source").mkdir()
    data = bytearray(encoded(200, 200, seed=0))
    (tmp_path / "source" / "good.jpg").write_bytes(data)
    data[len(data) // 2 : len(data) // 2 + 40] = np.random.default_rng(0).bytes(40).replace(b"\xff", b"\xfe")
    (tmp_path / "source" / "bad.jpg").write_bytes(data)
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), how]) == 0
    said = capsys.readouterr().out
    assert "damaged: bad.jpg: " in said
    assert "good.jpg" not in said
    assert "1 are damaged, and decoded as far as Pillow can" in said
    index = read_index(tmp_path / "out")
    assert len(index) == 2
    assert [line.split(":")[0] for line in index.provenance["damaged"]] == ["bad.jpg"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("where", [(ShardIndex, "save"), (Path, "unlink")], ids=["index", "journal"])
def test_interrupted_between_two_splits(source, tmp_path, monkeypatch, where, number):
    arguments = [str(source), str(tmp_path / "out"), "--val-share", "0.2", "--jobs", "1"]
    owner, name = where
    done, calls = getattr(owner, name), []

    def interrupted(self, *rest, **options):
        if owner is ShardIndex or self.name == JOURNAL:
            calls.append(self)
            if len(calls) == number:
                raise KeyboardInterrupt
        return done(self, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert len(stored(tmp_path / "out" / "train")) == 48
    assert len(stored(tmp_path / "out" / "val")) == 12
    assert not list((tmp_path / "out").rglob(JOURNAL))
    assert main(arguments) == 2  # complete


def test_one_process_at_a_time(source, tmp_path, capsys):
    slow = "import time, fcmae.data.packing as p; f = p.damage; p.damage = lambda d: (time.sleep(0.05), f(d))[1]; "
    slow += "from fcmae.data.make_shards import main; import sys; sys.exit(main())"
    arguments = [str(source), str(tmp_path / "out"), "--samples-per-shard", "10", "--jobs", "1"]
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list((tmp_path / "out").glob(".shard*")):
        assert process.poll() is None
        time.sleep(0.01)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: another process is writing shards here\n"
    assert process.wait() == 0
    assert len(stored(tmp_path / "out")) == 60
